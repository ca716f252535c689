"""Checks of what is computed from measured losses."""

import torch

from .. import strength
from .outcome import Outcome, Where


def parabola(where: Where) -> Outcome:
    """T33: the best strength of a quadratic curve is its least point, inside and beyond the grid; a bent-down one has an end."""
    grid = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    curves = [[(g - best) ** 2 for g in grid] for best in (0.3, 0.875, 1.4, -0.5)] + [[-g for g in grid]]
    measured = tuple(strength.best_strength(grid, losses) for losses in curves)
    return Outcome((0.3, 0.875, 1.4, 0.0, 1.25), measured)


def elasticity(where: Where) -> Outcome:
    """T35: the gain of γ^k has elasticity k, that of a parabola with its least point at g 2 (g - 1) / (2 g - 1)."""
    powers = (0.25, 1.0, 2.0)
    best = (0.8, 1.0, 1.1, 4.0)
    measured = [strength.elasticity(-k, 1.0) for k in powers]
    measured += [strength.elasticity(2 * (1 - g), g**2 - (1 - g) ** 2) for g in best]
    return Outcome((*powers, *(2 * (g - 1) / (2 * g - 1) for g in best)), tuple(measured))


def row_intervals(where: Where) -> Outcome:
    """T34: the bootstrap's deviation of a mean over rows is that of the rows over sqrt(n); paired columns differ by nothing."""
    rows = where.randn(400, 1, seed=3)
    draws = strength.resampled(torch.cat([rows, rows + 1], 1), torch.ones(400), draws=4000, seed=1)
    spread = float(rows.double().std(correction=0)) / 20
    paired = draws[:, 1] - draws[:, 0] - 1
    return Outcome((1.0, 0.0), (float(draws[:, 0].std()) / spread, float(paired.abs().max())), tolerance=0.04)
