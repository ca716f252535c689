"""How sharply the loss bends in an adapter's parameters, and whether the learning rate in force is too high for that.

Lanczos on the Hessian H of the loss of fixed rows, in evaluation mode, with H v from two gradients,

    H v = (g(θ + e v) - g(θ - e v)) / 2e

which needs no second derivatives: it works with fused attention, recomputed activations and 4-bit weights. With an optimizer's
state it is P^-1/2 H P^-1/2 for P = diag((sqrt(v) + eps) / lr), whose eigenvalues are lr times those of Adam's preconditioned
Hessian: on a quadratic Adam is stable below (2 + 2 β1) / (1 - β1), 38 at β1 = 0.9 (Cohen et al. 2022, arXiv 2207.14484).

Flat is not general: other factors of the same change have another H. Only the second form says anything, about the rate.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import DivergenceError, UsageError
from ..theory import curvature
from ..theory.judgement import Judgement
from ..theory.number import Kind, Number
from ..theory.thresholds import SHARPNESS


@dataclass(frozen=True)
class Adam:
    """What an Adam-like optimizer holds at a checkpoint, by parameter: second means without their bias, and rates."""

    squares: Sequence[Tensor]
    rates: Sequence[float]
    beta1: float
    eps: float

    def diagonal(self) -> Tensor:
        """Give (sqrt(v) + eps) / lr of all parameters in one vector."""
        return torch.cat([(v.sqrt() + self.eps).flatten() / lr for v, lr in zip(self.squares, self.rates, strict=True)])


@dataclass(frozen=True)
class Sharpness:
    """Ritz values, ascending; some eigenvalue of H (or of lr P^-1 H) lies within `residual` of each."""

    values: Tensor
    residuals: Tensor
    steps: int
    adam: Adam | None

    @property
    def largest(self) -> Number:
        """Give the largest eigenvalue, with the interval that its residual allows."""
        return self._number(-1)

    @property
    def negative(self) -> list[Number]:
        """Give the eigenvalues that are certainly below zero."""
        return [self._number(i) for i in range(len(self.values)) if float(self.values[i] + self.residuals[i]) < 0]

    @property
    def ratio(self) -> Number | None:
        """Give lr λ over Adam's threshold; None without an optimizer's state. Its null, the edge of stability, is 1."""
        if self.adam is None:
            return None
        edge = curvature.adam_threshold(1.0, self.adam.beta1)
        top = self.largest
        low, high = top.interval or (top.value, top.value)
        inputs = {"lr": max(self.adam.rates), "beta1": self.adam.beta1}
        interval = (low / edge, high / edge)
        return Number(top.value / edge, Kind.HEURISTIC, "adam_threshold", 1.0, interval, inputs=inputs)

    def judgement(self) -> Judgement | None:
        """Say whether the rate is too high; nothing without an optimizer's state."""
        ratio = self.ratio
        if ratio is None:
            return None
        refuted = "a gain ratio above 0.8 in training (train.diagnose): mini-batches can train above the edge"
        if SHARPNESS.crossed(ratio.value):
            statement = f"lr times the preconditioned sharpness is {ratio.value:.2f} of what Adam is stable at"
            return Judgement("learning_rate_high", statement, ratio, refuted, "lower optim.lr by that factor")
        statement = f"the learning rate is {1 / ratio.value:.3g} times below the edge of stability on these rows"
        after = "nothing to do; it may be raised if the gain ratio is near 1 as well"
        return Judgement("learning_rate_stable", statement, ratio, refuted, after)

    def _number(self, i: int) -> Number:
        value, residual = float(self.values[i]), float(self.residuals[i])
        return Number(value, Kind.ESTIMATE, "sharpness", None, (value - residual, value + residual), self.steps)


Gradient = Callable[[], Sequence[Tensor]]
"""Gives the gradient of one fixed loss by each parameter, at their present values."""


def sharpness(
    parameters: Sequence[Tensor], gradient: Gradient, *, steps: int = 20, adam: Adam | None = None, seed: int = 0
) -> Sharpness:
    """Run Lanczos for at most `steps` products, two gradients each. The parameters are put back, bit for bit.

    Raises DivergenceError if a gradient is not finite, UsageError if the optimizer's rates are zero.
    """
    if adam is not None and not all(rate > 0 for rate in adam.rates):
        raise UsageError(
            "the learning rate in force is 0", why="the schedule ends there", fix="take an earlier checkpoint, or --lr"
        )
    at = _flat(parameters)

    def flat_gradient(theta: Tensor) -> Tensor:
        _fill(parameters, theta)
        found = _flat(gradient())
        if not bool(found.isfinite().all()):
            raise DivergenceError("a gradient holds NaN or infinity", fix="take --dtype float32")
        return found

    def product(v: Tensor) -> Tensor:
        return curvature.difference_hvp(flat_gradient, at, v)

    start = torch.randn(at.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(at)
    with _restored(parameters):
        matvec = product if adam is None else curvature.preconditioned(product, adam.diagonal().to(at))
        # What the differences leave of an exactly invariant subspace is their own rounding, not rounding of `at`.
        found = curvature.lanczos(matvec, start, steps, tolerance=torch.finfo(at.dtype).eps ** 0.5)
    return Sharpness(found.values, found.residuals.abs(), found.steps, adam)


@contextmanager
def _restored(parameters: Sequence[Tensor]) -> Generator[None]:
    before = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


@torch.no_grad()
def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


@torch.no_grad()
def _fill(parameters: Sequence[Tensor], theta: Tensor) -> None:
    for p, values in zip(parameters, theta.split([p.numel() for p in parameters]), strict=True):
        p.copy_(values.view_as(p))
