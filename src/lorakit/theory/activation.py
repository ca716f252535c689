"""A change of lower rank that is best for the inputs it will see, not for the weights.

For inputs with second moment Σ = E[x x^T] the output error of X in the place of ΔW is ||(ΔW - X) Σ^(1/2)||_F. With
ΔW = U S V^T the left singular vectors of ΔW Σ^(1/2) are U Q, where Q diagonalises S (V^T Σ V) S, so the best X of rank q is

    X = U Q_q Q_q^T S V^T        error^2 = sum_{i>q} μ_i^2        μ: singular values of S (V^T Σ V)^(1/2)

All of it is r x r once V^T Σ V is there; Σ is never inverted, so directions that no input has are no trouble. Σ = 1 gives the
truncated SVD. By definition X is at least as good as that in output and at most as good in weights. Eckart and Young 1936.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import spectrum
from ._precision import wide
from .spectrum import Factored


class Seen(NamedTuple):
    """A change as its inputs see it: μ (r,) descending, and Q (r, r), which turns U to the best directions of the output."""

    mu: Tensor
    Q: Tensor


def seen(delta: Factored, moment: Tensor) -> Seen:
    """Give the output spectrum of a change (out, in) for inputs of second moment (in, in)."""
    inside = wide(delta.V).T @ wide(moment) @ wide(delta.V)
    values, vectors = torch.linalg.eigh((inside + inside.T) / 2)
    root = vectors * values.clamp_min(0).sqrt()  # root root^T = V^T Σ V
    Q, mu, _ = torch.linalg.svd(delta.S[:, None] * root)
    return Seen(mu, Q)


def truncated(delta: Factored, seen: Seen, q: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Give balanced A (q, in) and B (out, q) with s·B·A = the best approximation of rank q in the output's norm."""
    Q = seen.Q[:, :q]
    left, S, right = torch.linalg.svd(Q.T * delta.S, full_matrices=False)  # of rank q: nothing is cut here
    return spectrum.truncated(Factored(delta.U @ (Q @ left), S, delta.V @ right.T), q, scale)


def output_norm(delta: Factored, moment: Tensor) -> float:
    """Give sqrt(tr(ΔW Σ ΔW^T)), the root mean square of ||ΔW x|| over the inputs. U and V need not be orthonormal."""
    U, V = wide(delta.U) * delta.S, wide(delta.V)
    return float(((U.T @ U) * (V.T @ wide(moment) @ V)).sum().clamp_min(0).sqrt())
