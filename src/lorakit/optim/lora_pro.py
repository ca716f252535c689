"""LoRA-Pro: move A and B so that their product follows the gradient of the full weight. Wang, Liang et al. 2024,
https://arxiv.org/abs/2407.18242

    g^A = (B^T B)^-1 g_A / s^2 + X A                  X solves  B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2
    g^B = (I - P_B) g_B (A A^T)^-1 / s^2 - B X        P_B = B (B^T B)^-1 B^T,  P_A = A^T (A A^T)^-1 A

To first order W then moves by -lr (P_B G + (I - P_B) G P_A), the matrix nearest to the full gradient G that a step of
the two factors can give. X does not change that; this one keeps g^A and g^B nearest to g_A and g_B. Inverses are
pseudo-inverses: with B = 0 at the start g^A is zero, as g_A is, and g^B = g_B (A A^T)^-1 / s^2, the paper's first
step.

    adam: true    AdamW of the full gradient s (B g^A + g^B A), brought back onto the factors. It keeps two numbers per
                  entry of the full weight: the state of training the layer in full (`state_bytes` counts it).
                  Rates are those of full fine-tuning, not LoRA's.
    adam: false   plain descent. No state at all.

What is not a factor is trained by AdamW.

When: a LoRA is to follow full fine-tuning as nearly as it can. It costs, with `adam`, two numbers for each weight of
the adapted layers, which is the memory LoRA saves; without it an r x r equation a layer and step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import UsageError
from ._base import Optimizer, adam_bytes, adam_direction, adamw
from ._pairs import pairs
from .groups import Factors, Groups, OptimSettings

BY_METHOD = True  # what it refuses is known from the method, whatever the layers


@dataclass(frozen=True, kw_only=True)
class Options:
    """adam: keep Adam's two means of the full gradient, (out, in) each; without, plain descent."""

    adam: bool = True


def build(groups: Groups, settings: OptimSettings) -> torch.optim.Optimizer:
    """Make the optimizer. Raises UsageError if the change is not s·B·A, A is frozen, or A and B have two rates."""
    factors = pairs(groups, "lora_pro", product=True)
    frozen = [f.path for f in factors if not f.A.requires_grad]
    if frozen:
        raise UsageError(f"optim.name: lora_pro moves A and B, and A of {frozen[0]} is frozen", fix="optim.name: adamw")
    if len({group["lr"] for group in groups if group["role"] in ("A", "B")}) > 1:
        why = "A and B take one step of the full weight together"
        raise UsageError("optim.name: lora_pro has one rate for A and B", why=why, fix="leave optim.b_ratio at 1")
    return LoRAPro(groups, factors, settings, adam=Options(**(settings.options or {})).adam)


def planned_bytes(groups: Groups, settings: OptimSettings) -> int:
    """Give the bytes of the state that this optimizer will keep: with `adam`, two means (out, in) for each pair."""
    paired = {id(p) for f in groups.factors for p in (f.A, f.B)}
    others = sum(adam_bytes(p) for group in groups for _, p in group["params"] if id(p) not in paired)
    full = sum(2 * len(f.B) * f.A.shape[1] * f.B.element_size() for f in groups.factors)
    return others + (full if Options(**(settings.options or {})).adam else 0)


def adjusted(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Give g^A (r, in) and g^B (out, r) for the gradients of the factors."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    a, b, g_a, g_b, s = (t.to(dtype) for t in (A, B, g_A, g_B, scale))
    AA, BB = a @ a.T, b.T @ b
    AA_inverse, BB_inverse = (torch.linalg.pinv(m, hermitian=True) for m in (AA, BB))
    full_A = BB_inverse @ g_a / s**2
    full_B = (g_b - b @ (BB_inverse @ (b.T @ g_b))) @ AA_inverse / s**2
    X = _sylvester(BB, AA, -full_A @ a.T)
    return (full_A + X @ a).to(A.dtype), (full_B - b @ X).to(B.dtype)


def _sylvester(left: Tensor, right: Tensor, C: Tensor) -> Tensor:
    """Solve left X + X right = C for symmetric non-negative matrices (r, r); where both are singular X is zero."""
    l_values, L = torch.linalg.eigh(left)
    r_values, R = torch.linalg.eigh(right)
    sums = l_values[:, None] + r_values
    tiny = sums.abs() <= sums.abs().max() * len(C) * torch.finfo(C.dtype).eps
    return L @ ((L.T @ C @ R) / sums.masked_fill(tiny, torch.inf)) @ R.T


class LoRAPro(Optimizer):
    """The two factors of a layer in one step; the means of the full gradient are in the state of B."""

    def __init__(self, groups: Groups, factors: list[Factors], settings: OptimSettings, *, adam: bool) -> None:
        super().__init__(groups, settings)
        self.factors, self.adam = factors, adam

    def update(self) -> None:
        """Take one step."""
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        paired = {id(p) for f in self.factors for p in (f.A, f.B)}
        for f in self.factors:
            if f.A.grad is not None and f.B.grad is not None and f.scale is not None:
                a, b = self._directions(f, f.A.grad, f.B.grad, f.scale, group_of[id(f.B)])
                for p, change in ((f.A, a), (f.B, b)):
                    group = group_of[id(p)]
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * change)
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) not in paired:
                    adamw(p, self.state[p], group)

    def _directions(self, f: Factors, g_A: Tensor, g_B: Tensor, s: Tensor, group: dict) -> tuple[Tensor, Tensor]:
        a, b = adjusted(f.A, f.B, g_A, g_B, s)
        if not self.adam:
            return a, b
        full = adam_direction(self.state[f.B], s * (f.B @ a + b @ f.A), group)
        return adjusted(f.A, f.B, s * f.B.T @ full, s * full @ f.A.T, s)
