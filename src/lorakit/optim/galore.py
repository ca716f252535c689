"""GaLore: Adam in the subspace of the gradient's largest directions. Zhao et al. 2024, https://arxiv.org/abs/2403.03507

    every `refresh` steps:  G = U S V^T        P = the first `rank` columns of V, or of U if G is wider than tall
    R = G P or P^T G        N = Adam(R)        W = W - lr · scale · (N P^T or P N)

The state of a matrix (n, m) with n >= m is P (m, rank) and two means (n, rank), instead of AdamW's two (n, m). It is
an optimizer for weights trained in full (`modules_to_save`, a method that trains the layers themselves); the factors
of a LoRA have no smaller subspace worth the name, unless `rank` is below theirs. Matrices with a side shorter than
`rank`, and all that are no matrices, are trained by AdamW.

As in the authors' code the means are kept as they are when P changes, although they belong to the old subspace.

When: all weights are to be trained with less optimizer state. It costs a singular value decomposition of each
gradient every `refresh` steps; the weights and their gradients stay as large as in full fine-tuning.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import UsageError
from ._base import Optimizer, adam_bytes, adam_direction, adamw
from .groups import Groups, OptimSettings


@dataclass(frozen=True, kw_only=True)
class Options:
    """The subspace, and what is done in it.

    rank: dimension of the subspace
    refresh: steps between two looks for the subspace
    scale: factor of the update
    inner: adam, or sgd with the momentum betas[0]
    """

    rank: int = 128
    refresh: int = 200
    scale: float = 0.25
    inner: Literal["adam", "sgd"] = "adam"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.refresh < 1:
            raise UsageError(f"rank and refresh must be at least 1, not {self.rank} and {self.refresh}")


def build(groups: Groups, settings: OptimSettings) -> torch.optim.Optimizer:
    """Make the optimizer. Raises UsageError if no trained matrix has both sides at least `rank` long."""
    options = Options(**(settings.options or {}))
    sides = [min(p.shape) for group in groups for _, p in group["params"] if p.dim() == 2]
    if not any(side >= options.rank for side in sides):
        raise UsageError(
            "optim.name: galore has nothing to project",
            why=f"no trained matrix has both sides at least optim.options.rank = {options.rank} long; "
            f"the longest short side is {max(sides, default=0)}",
            fix="lower optim.options.rank, or train weights in full: method.modules_to_save",
        )
    return GaLore(groups, settings, options)


def planned_bytes(groups: Groups, settings: OptimSettings) -> int:
    """Give the bytes of the state that this optimizer will keep: P and the means of R, AdamW's for the rest."""
    options = Options(**(settings.options or {}))
    means = 2 if options.inner == "adam" else int(settings.betas[0] > 0)

    def of(p: Tensor) -> int:
        if not _projected(p, options.rank):
            return adam_bytes(p)
        return options.rank * (min(p.shape) + means * max(p.shape)) * p.element_size()

    return sum(of(p) for group in groups for _, p in group["params"])


def _projected(p: Tensor, rank: int) -> bool:
    return p.dim() == 2 and min(p.shape) >= rank


class GaLore(Optimizer):
    """Low-rank updates for matrices, AdamW for everything else."""

    def __init__(self, groups: Groups, settings: OptimSettings, options: Options) -> None:
        super().__init__(groups, settings)
        self.options = options

    def update(self) -> None:
        """Take one step."""
        for group in self.param_groups:
            for p in group["params"]:
                if not _projected(p, self.options.rank):
                    adamw(p, self.state[p], group)
                elif p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * self.options.scale * self._update(p.grad, self.state[p], group))

    def _update(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        seen = state.setdefault("seen", 0)
        if seen % self.options.refresh == 0:
            if not gradient.any():  # has no directions: that of A, while B is zero
                return gradient
            state["projector"] = _projector(gradient, self.options.rank)
        state["seen"] += 1
        P = state["projector"]
        if gradient.shape[0] >= gradient.shape[1]:
            return self._inner(gradient @ P, state, group) @ P.T
        return P @ self._inner(P.T @ gradient, state, group)

    def _inner(self, R: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Give what moves the weight inside the subspace."""
        if self.options.inner == "adam":
            return adam_direction(state, R, group)
        if group["betas"][0] == 0:
            return R
        return state.setdefault("momentum_buffer", torch.zeros_like(R)).mul_(group["betas"][0]).add_(R)


def _projector(gradient: Tensor, rank: int) -> Tensor:
    """Give an orthonormal basis (short side, rank) of the largest directions along the short side."""
    U, _, Vh = torch.linalg.svd(gradient.to(torch.promote_types(gradient.dtype, torch.float32)), full_matrices=False)
    basis = Vh[:rank].T if gradient.shape[0] >= gradient.shape[1] else U[:, :rank]
    return basis.to(gradient.dtype).contiguous()
