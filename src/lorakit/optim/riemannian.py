"""AdamW on gradients that each factor scales for the other. Riemannian Preconditioned LoRA, Zhang and Pilanci 2024,
https://arxiv.org/abs/2402.02347

    g_A' = (B^T B + reg I)^-1 g_A        g_B' = g_B (A A^T + reg I)^-1

It is steepest descent in a metric on the pairs (A, B) under which it does not matter how B A is split into its
factors. The two r x r matrices are all it costs: there is no state beyond AdamW's. The default of `reg` is PEFT's.

When: the learning rate of LoRA is hard to find, or the two factors are of very different sizes. It costs two r x r
solves a layer and step, and no memory beyond AdamW's.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..core.errors import UsageError
from ._base import torch_adamw_bytes
from ._pairs import before_each_step, pairs
from .groups import Factors, Groups, OptimSettings

BY_METHOD = True  # what it refuses is known from the method, whatever the layers


@dataclass(frozen=True, kw_only=True)
class Options:
    """reg: what is added to the diagonal of each r x r matrix before it is inverted."""

    reg: float = 1e-2

    def __post_init__(self) -> None:
        if not self.reg > 0:
            raise UsageError(f"reg must be greater than 0, not {self.reg}", why="B starts at zero, and so does B^T B")


def build(groups: Groups, settings: OptimSettings) -> torch.optim.Optimizer:
    """Make the optimizer. Raises UsageError if the adapter has no pairs of factors A and B."""
    factors = pairs(groups, "riemannian", product=False)
    reg = Options(**(settings.options or {})).reg
    adamw = torch.optim.AdamW(list(groups), lr=settings.lr, betas=settings.betas, eps=settings.eps)
    return before_each_step(adamw, partial(_scale_all, factors, reg))


def planned_bytes(groups: Groups, settings: OptimSettings) -> int:
    """Give the bytes of the state that this optimizer will keep: AdamW's."""
    return torch_adamw_bytes(groups)


def scaled(A: Tensor, B: Tensor, g_A: Tensor | None, g_B: Tensor | None, reg: float) -> list[Tensor | None]:
    """Give g_A' (r, in) and g_B' (out, r); None stays None (a frozen factor)."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    a, b, identity = A.to(dtype), B.to(dtype), torch.eye(len(A), dtype=dtype, device=A.device)
    if g_A is not None:
        g_A = torch.linalg.solve(b.T @ b + reg * identity, g_A.to(dtype)).to(g_A.dtype)
    if g_B is not None:
        g_B = torch.linalg.solve(a @ a.T + reg * identity, g_B.to(dtype), left=False).to(g_B.dtype)
    return [g_A, g_B]


def _scale_all(factors: list[Factors], reg: float) -> None:
    for f in factors:
        f.A.grad, f.B.grad = scaled(f.A, f.B, f.A.grad, f.B.grad, reg)
