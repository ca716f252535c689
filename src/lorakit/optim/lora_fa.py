"""LoRA-FA: A stays as it was drawn, B follows the gradient of the weight projected onto A's rows. Zhang et al. 2023,
https://arxiv.org/abs/2308.03303

    g_B' = g_B (A A^T)^-1 / s^2        then AdamW on B

With plain descent the change of the weight would be -lr G P, G the gradient by the weight and P = A^T (A A^T)^-1 A: as
near to -lr G as the rows of A allow, whatever the size of A and s.

A is frozen here (its `requires_grad` is switched off), so the backward pass keeps A x (r numbers per token) instead of
x, and there is no optimizer state for A. What is not a factor is trained by AdamW. The r x r inverse is computed in
fp32; PEFT's `create_lorafa_optimizer` has the same rule but runs this product under bf16 autocast wherever bf16
exists.

When: LoRA's A may stay as it was drawn: the inputs of the layers need not be kept, and there is no state for A. It
costs an r x r inverse a layer and step, and what A cannot see.
"""

from functools import partial

import torch
from torch import Tensor

from ..core.errors import UsageError
from ._base import torch_adamw_bytes
from ._pairs import before_each_step, pairs
from .groups import Factors, Groups, OptimSettings

FREEZES = "A"
BY_METHOD = True  # what it refuses is known from the method, whatever the layers
DAMPING = 1e-8  # added to the diagonal of A A^T, as in PEFT


def build(groups: Groups, settings: OptimSettings) -> torch.optim.Optimizer:
    """Make the optimizer and freeze each A. Raises UsageError if the adapter is not s·B·A, or an A is zero."""
    factors = pairs(groups, "lora_fa", product=True)
    dead = [f.path for f in factors if not f.A.is_meta and not f.A.count_nonzero()]
    if dead:
        raise UsageError(
            f"optim.name: lora_fa cannot train {dead[0]}: its A is zero and would stay so",
            why="in an embedding, and with method.init: init_b, it is A that starts at zero",
            fix="leave such layers out with exclude_modules, or take another optimizer",
        )
    for f in factors:
        f.A.requires_grad_(False)
    adamw = torch.optim.AdamW(_without_A(groups), lr=settings.lr, betas=settings.betas, eps=settings.eps)
    return before_each_step(adamw, partial(_project_all, factors))


def planned_bytes(groups: Groups, settings: OptimSettings) -> int:
    """Give the bytes of the state that this optimizer will keep: AdamW's, without A."""
    return torch_adamw_bytes(_without_A(groups))


def _without_A(groups: Groups) -> Groups:
    frozen = {id(f.A) for f in groups.factors}
    trained = [{**g, "params": [(n, p) for n, p in g["params"] if id(p) not in frozen]} for g in groups]
    return Groups([group for group in trained if group["params"]], groups.factors)


def projected(A: Tensor, g_B: Tensor, scale: Tensor) -> Tensor:
    """Give g_B (A A^T)^-1 / s^2, (out, r)."""
    wide = A.to(torch.promote_types(A.dtype, torch.float32))
    damped = wide @ wide.T + DAMPING * torch.eye(len(A), dtype=wide.dtype, device=A.device)
    inverse = torch.linalg.pinv(damped, hermitian=True)
    return (g_B.to(wide.dtype) @ inverse / scale.to(wide.dtype) ** 2).to(g_B.dtype)


def _project_all(factors: list[Factors]) -> None:
    for f in factors:
        if f.B.grad is not None and f.scale is not None:
            f.B.grad = projected(f.A, f.B.grad, f.scale)
