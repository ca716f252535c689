"""Muon on the factors: each update of A and of B is its momentum made orthogonal. Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/; the size of the update after Liu et al. 2025,
https://arxiv.org/abs/2502.16982

    M = momentum M + (1 - momentum) g        O = orthogonal(nesterov: (1 - momentum) g + momentum M)
    P = P - lr · 0.2 sqrt(max(rows, columns)) · O

All directions of the update come out about equally large: five Newton-Schulz steps put every singular value that is
not tiny between 0.7 and 1.2. The factor 0.2 sqrt(...) gives O the root mean square that AdamW's updates have, so
AdamW's rates carry over. One number per entry is kept instead of AdamW's two.

Only matrices of the roles A and B are moved so; heads, weights trained in full, magnitudes and biases are trained by
AdamW.

When: half of AdamW's state is to go, or the factors' updates are dominated by a few directions. It costs five
products of r x r and r x in matrices a factor and step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import UsageError
from ._base import Optimizer, adam_bytes, adamw
from .groups import Groups, OptimSettings

BY_METHOD = True  # what it refuses is known from the method, whatever the layers
QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at zero; does not converge to 1 but stays near it


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the updates are made.

    momentum: decay rate of the running mean of the gradient
    nesterov: look one step ahead
    steps: of Newton-Schulz
    """

    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum must be in [0, 1), not {self.momentum}")
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, not {self.steps}")


def build(groups: Groups, settings: OptimSettings) -> torch.optim.Optimizer:
    """Make the optimizer. Raises UsageError if no matrix is a factor A or B."""
    if not any(_is_factor(p, group) for group in groups for _, p in group["params"]):
        why = "it makes the updates of the factors A and B orthogonal, and this adapter has none that are matrices"
        raise UsageError("optim.name: muon has nothing to work on", why=why, fix="optim.name: adamw")
    return Muon(groups, settings, Options(**(settings.options or {})))


def planned_bytes(groups: Groups, settings: OptimSettings) -> int:
    """Give the bytes of the state that this optimizer will keep: the momentum of each factor, AdamW's for the rest."""
    members = [(p, group) for group in groups for _, p in group["params"]]
    return sum(p.nbytes if _is_factor(p, group) else adam_bytes(p) for p, group in members)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of a matrix to about 1 and leave its singular vectors; zero stays zero."""
    a, b, c = QUINTIC
    X = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    X = X / X.norm().clamp_min(torch.finfo(X.dtype).tiny)
    for _ in range(steps):
        gram = X @ X.T
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X.T if matrix.shape[0] > matrix.shape[1] else X


def _is_factor(p: Tensor, group: dict) -> bool:
    return group["role"] in ("A", "B") and p.dim() == 2


class Muon(Optimizer):
    """Orthogonal updates for the factors, AdamW for everything else."""

    def __init__(self, groups: Groups, settings: OptimSettings, options: Options) -> None:
        super().__init__(groups, settings)
        self.options = options

    def update(self) -> None:
        """Take one step."""
        for group in self.param_groups:
            for p in group["params"]:
                if not _is_factor(p, group):
                    adamw(p, self.state[p], group)
                elif p.grad is not None:
                    size = 0.2 * math.sqrt(max(p.shape))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * size * orthogonal(self._direction(p, p.grad), self.options.steps))

    def _direction(self, p: Tensor, gradient: Tensor) -> Tensor:
        state, rate = self.state[p], 1 - self.options.momentum
        mean = state.setdefault("exp_avg", torch.zeros_like(gradient)).lerp_(gradient, rate)
        return mean.lerp(gradient, rate) if self.options.nesterov else mean
