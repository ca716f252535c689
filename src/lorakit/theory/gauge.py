"""The freedom of the factors: (B R, R^-1 A) is the same ΔW for every invertible R (r, r).

So norms, condition numbers and curvatures of A and B alone say nothing about what was learned. What gradient flow keeps
(A A^T - B^T B) is a fact about the parametrisation, and it can be chosen: `rebalance`.
Arora, Cohen and Hazan 2018, https://arxiv.org/abs/1802.06509; Du, Hu and Lee 2018, https://arxiv.org/abs/1806.00900
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import spectrum
from ._precision import wide


def transform(A: Tensor, B: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Give (R^-1 A, B R): other factors of the same product. A (r, k), B (d, r), R (r, r) invertible."""
    return torch.linalg.solve(wide(R), wide(A)), wide(B) @ wide(R)


def imbalance(A: Tensor, B: Tensor) -> float:
    """Give ||A A^T - B^T B||_F / (||A A^T||_F + ||B^T B||_F), from 0 (balanced) to 1; NaN if both are zero."""
    a, b = wide(A) @ wide(A).T, wide(B).T @ wide(B)
    total = float(torch.linalg.matrix_norm(a) + torch.linalg.matrix_norm(b))
    return float(torch.linalg.matrix_norm(a - b)) / total if total else math.nan


def rebalance(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Give A' (r, k), B' (d, r) with B'A' = B A and A'A'^T = B'^T B' = diag(σ). Rows beyond the rank are zero."""
    found = spectrum.svd(A, B)
    root = found.S.sqrt()
    new_A, new_B = torch.zeros_like(wide(A)), torch.zeros_like(wide(B))
    new_A[: len(root)] = root[:, None] * found.V.T
    new_B[:, : len(root)] = found.U * root
    return new_A, new_B


def drift(dA: Tensor, dB: Tensor, lr: float) -> Tensor:
    """Give what one SGD step of equal rate adds to A A^T - B^T B: lr^2 (dA dA^T - dB^T dB), exactly, whatever s.

    The terms of first order cancel: A dA^T = s A (B^T G)^T = (dB^T B)^T. Adam, decay and clipping break it. dA (r, k), dB (d, r).
    """
    dA, dB = wide(dA), wide(dB)
    return lr**2 * (dA @ dA.T - dB.T @ dB)


def conserved(A: Tensor, B: Tensor, lr_A: float, lr_B: float) -> Tensor:
    """Give A A^T / lr_A - B^T B / lr_B, which gradient flow with two rates (LoRA+) keeps; the plain difference it does not."""
    A, B = wide(A), wide(B)
    return A @ A.T / lr_A - B.T @ B / lr_B


def nuclear_gap(A: Tensor, B: Tensor) -> float:
    """Give (||A||_F^2 + ||B||_F^2) / 2 over ||B A||_*, at least 1, and 1 exactly where balanced; NaN for B A = 0."""
    half = (float(wide(A).square().sum()) + float(wide(B).square().sum())) / 2
    nuclear = spectrum.nuclear(spectrum.singular_values(A, B))
    return half / nuclear if nuclear > 0 else math.nan


def decay_survival(lrs: Sequence[float], weight_decay: float) -> float:
    """Give the share of a weight that decoupled decay (AdamW) leaves of it: product of (1 - lr_t λ), about exp(-λ sum lr_t).

    Of ΔW = s·B·A, with both factors decayed, the square of it is left. It pulls to W_0, not to zero.
    """
    return math.exp(math.fsum(math.log1p(-lr * weight_decay) for lr in lrs))
