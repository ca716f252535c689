"""The singular values of ΔW = s·B·A from its factors, without ever making ΔW, and what is read off them.

B = Q_B R_B and A^T = Q_A R_A (thin QR), so ΔW = Q_B (s R_B R_A^T) Q_A^T and the r x r core has the singular values of ΔW:
O((d + k) r^2 + r^3) instead of O(d k min(d, k)). Gram matrices (eigh of A A^T) would square the condition number: they lose
every singular value below 1e-8 of the largest.

Holds for every B and A, r above the rank included. Eckart and Young 1936; Mirsky 1960; Golub and Van Loan, section 5.4.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import wide


class Factored(NamedTuple):
    """ΔW = U diag(S) V^T: U (d, q), S (q,) descending, V (k, q), q = min(d, k, r)."""

    U: Tensor
    S: Tensor
    V: Tensor


def core(A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Give s R_B R_A^T (min(d, r), min(k, r)), which has the singular values of s·B·A. A (r, k), B (d, r)."""
    _, R_B = torch.linalg.qr(wide(B), mode="r")
    _, R_A = torch.linalg.qr(wide(A).T, mode="r")
    return scale * (R_B @ R_A.T)


def singular_values(A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Give the min(d, k, r) largest singular values of s·B·A, descending, float64. A (r, k), B (d, r)."""
    return torch.linalg.svdvals(core(A, B, scale))


def svd(A: Tensor, B: Tensor, scale: float = 1.0) -> Factored:
    """Give U, S, V of s·B·A. A (r, k), B (d, r)."""
    Q_B, R_B = torch.linalg.qr(wide(B))
    Q_A, R_A = torch.linalg.qr(wide(A).T)
    u, S, vh = torch.linalg.svd(scale * (R_B @ R_A.T), full_matrices=False)
    return Factored(Q_B @ u, S, Q_A @ vh.T)


def dense_svd(delta: Tensor) -> Factored:
    """Give U, S, V of a change (d, k) that has no factors."""
    U, S, vh = torch.linalg.svd(wide(delta), full_matrices=False)
    return Factored(U, S, vh.T)


# --- norms and ranks of a spectrum ----------------------------------------------------------------------------------


def frobenius(S: Tensor) -> float:
    """Give ||ΔW||_F = sqrt(sum σ_i^2)."""
    return float(torch.linalg.vector_norm(S))


def spectral(S: Tensor) -> float:
    """Give ||ΔW||_2 = σ_1, 0 for an empty spectrum."""
    return float(S[0]) if len(S) else 0.0


def nuclear(S: Tensor) -> float:
    """Give ||ΔW||_* = sum σ_i."""
    return float(S.sum())


def stable_rank(S: Tensor) -> float:
    """Give ||ΔW||_F^2 / ||ΔW||_2^2, from 1 to the rank; NaN for ΔW = 0. Rudelson and Vershynin 2007."""
    return _ratio(float(S.square().sum()), spectral(S) ** 2)


def effective_rank(S: Tensor) -> float:
    """Give exp(H(p)) for p = σ / sum σ, from 1 to the rank; NaN for ΔW = 0. Roy and Vetterli 2007."""
    return _perplexity(S)


def energy_effective_rank(S: Tensor) -> float:
    """Give exp(H(p)) for p = σ^2 / sum σ^2; NaN for ΔW = 0. It is at most `effective_rank`."""
    return _perplexity(S.square())


def participation(S: Tensor) -> float:
    """Give the participation ratio (sum σ^2)^2 / sum σ^4, from 1 to the rank; NaN for ΔW = 0."""
    p = _shares(S.square())
    return _ratio(1.0, float(p.square().sum()))


def energy_rank(S: Tensor, share: float) -> int:
    """Give the least q with sum_{i<=q} σ_i^2 >= share of the total; 0 for ΔW = 0."""
    p = _shares(S.square())
    reached = p.cumsum(0) >= share * (1 - 1e-12)  # the last sum may fall short of 1 by rounding
    return int(reached.to(torch.int64).argmax()) + 1 if bool(reached.any()) else 0


def numerical_rank(S: Tensor, d: int, k: int, eps: float = torch.finfo(torch.float64).eps) -> int:
    """Count σ_i > max(d, k) eps σ_1. `eps` is that of the arithmetic, or relative storage noise (`rounding.storage_error`)."""
    return int((max(d, k) * eps * spectral(S) < S).sum())


def condition(S: Tensor, d: int, k: int) -> float:
    """Give σ_1 / σ_q over the q numerically nonzero singular values; NaN for ΔW = 0. High is normal: spectra decay."""
    rank = numerical_rank(S, d, k)
    return _ratio(spectral(S), float(S[rank - 1]) if rank else 0.0)


# --- truncation -------------------------------------------------------------------------------------------------------


class Truncation(NamedTuple):
    """The least possible ||ΔW - X|| over all X of rank q, in three norms."""

    frobenius: float
    spectral: float
    nuclear: float


def truncation_error(S: Tensor, q: int) -> Truncation:
    """Give the errors of the best approximation of rank q: sqrt(sum_{i>q} σ_i^2), σ_{q+1} and sum_{i>q} σ_i.

    One and the same X, the first q triplets, is best in every unitarily invariant norm (Mirsky 1960). It is best in weights,
    not in loss.
    """
    tail = S[q:]
    return Truncation(frobenius(tail), spectral(tail), nuclear(tail))


def truncated(factored: Factored, q: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Give balanced A (q, k) and B (d, q) with s·B·A = the best approximation of rank q. `scale` is the s to be kept."""
    root = (factored.S[:q] / scale).sqrt()
    return root[:, None] * factored.V[:, :q].T, factored.U[:, :q] * root


def _shares(values: Tensor) -> Tensor:
    total = values.sum()
    return values / total if float(total) > 0 else torch.zeros_like(values)


def _perplexity(values: Tensor) -> float:
    p = _shares(values)
    p = p[p > 0]
    return math.exp(-float((p * p.log()).sum())) if len(p) else math.nan


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan
