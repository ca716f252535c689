"""The strength γ of a change γ ΔW: where a measured curve has its least value, and intervals over rows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._precision import wide


def best_strength(gammas: Sequence[float], losses: Sequence[float], most: float = 2.0) -> float:
    """Give the least point of the parabola through the lowest of three or more points and its two neighbours, within 0 to `most`.

    At an end of the grid the parabola is that of the three points there. Exact for a quadratic curve. A parabola that does
    not open upwards has no least point: then the lowest of the points. NaN if a loss is not finite.
    """
    if not all(map(math.isfinite, losses)):
        return math.nan
    lowest = min(range(len(losses)), key=losses.__getitem__)
    first = min(max(lowest - 1, 0), len(losses) - 3)
    (a, fa), (b, fb), (c, fc) = zip(gammas[first : first + 3], losses[first : first + 3], strict=True)
    left, right = (fb - fa) / (b - a), (fc - fb) / (c - b)
    bend = (right - left) / (c - a)
    if bend <= 0:
        return gammas[lowest]
    return min(max((a + b) / 2 - left / (2 * bend), 0.0), most)


def elasticity(slope: float, gain: float) -> float:
    """Give d ln(gain) / d ln γ at 1, which is -dL/dγ over L(0) - L(1): by what share of itself the gain would grow with γ.

    0 at the best strength, 1 where a gain still grows in proportion to γ, below 0 past the best strength. NaN without a gain.
    """
    return -slope / gain if gain > 0 else math.nan


def resampled(sums: Tensor, weights: Tensor, draws: int = 1000, seed: int = 0) -> Tensor:
    """Give the means (draws, m) over bootstrap resamples of n rows: sums (n, m) of each row over weights (n,).

    All m columns see the same resample, so differences between columns are paired. Efron 1979. The unit is the row: tokens of
    one row go together.
    """
    n = len(weights)
    rows = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, rows, torch.ones(draws, n, dtype=torch.float64))
    return (counts @ wide(sums).cpu()) / (counts @ wide(weights).cpu())[:, None]


def interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Give the quantiles of bootstrap values (draws,) that leave (1 - level)/2 at each side; NaN draws are left out."""
    kept = values[values.isfinite()]
    if not len(kept):
        return math.nan, math.nan
    tail = (1 - level) / 2
    return float(kept.quantile(tail)), float(kept.quantile(1 - tail))
