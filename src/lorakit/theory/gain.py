"""Cheap looks at training: did the loss fall as the gradient promised, how noisy is the gradient, what did the last steps bring."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._precision import inner, wide


def gain_ratio(before: float, after: float, slope: float) -> float:
    """Give (after - before) / slope, slope = <grad, step>, all of one batch and one dropout mask.

    1 on a straight line; 1 - lr g^T H g / (2 g^T g) for a gradient step on a quadratic, 1/2 at lr = 1/λ; negative where the
    loss rose. NaN where slope >= 0: with momentum the step may climb this batch. Conn, Gould and Toint, Trust-region methods.
    """
    return (after - before) / slope if slope < 0 else math.nan


def curve_exponent(evaluations: Sequence[tuple[int, float]]) -> float:
    """Give p of loss ~ steps^-p between the last of (step, held-out loss) and the one nearest to half as many steps.

    The same rows at both, so their difficulty cancels. Exact for a power law; 2^p - 1 is what the last doubling of steps took
    off, of what is left. Negative where the loss rose. NaN without an evaluation at a quarter to three quarters of the steps.
    """
    (*earlier, (step, loss)) = evaluations
    near = [(t, value) for t, value in earlier if step / 4 <= t <= 3 * step / 4]
    if not near or loss <= 0:
        return math.nan
    begun, at_half = min(near, key=lambda e: abs(math.log(2 * e[0] / step)))
    return math.log(at_half / loss) / math.log(step / begun)


class NoiseScale(NamedTuple):
    """Unbiased |mean gradient|^2 and trace of one sample's covariance, and their ratio, the batch size where they balance."""

    signal: float
    noise: float
    batch: float
    """NaN where the signal is not positive: this many samples show no reproducible gradient."""


def noise_scale(G1: Tensor, G2: Tensor, n: int) -> NoiseScale:
    """Give it from the mean gradients of two halves of n independent samples: <G1, G2> and n ||G1 - G2||_F^2 / 4.

    The unit of n is the sequence, not the token: tokens of one sequence go together. McCandlish et al. 1812.06162.
    """
    return _noise_scale(inner(G1, G2), n * float((wide(G1) - wide(G2)).square().sum()) / 4)


def noise_scale_of(gradients: Sequence[Tensor], samples: float) -> NoiseScale:
    """Give it from the mean gradients of m >= 2 micro-batches of `samples` each: all pairs instead of one."""
    squares = math.fsum(float(wide(g).square().sum()) for g in gradients)
    total = sum((wide(g) for g in gradients[1:]), wide(gradients[0]))
    return noise_scale_from(squares, float(total.square().sum()), len(gradients), samples)


def noise_scale_from(squares: float, total: float, m: int, samples: float) -> NoiseScale:
    """Give it from sums that need no m gradients at a time: squares = sum ||g_i||^2, total = ||sum g_i||^2."""
    pairs = (total - squares) / (m * (m - 1))
    return _noise_scale(pairs, samples * (squares / m - pairs))


def _noise_scale(signal: float, noise: float) -> NoiseScale:
    return NoiseScale(signal, noise, noise / signal if signal > 0 else math.nan)
