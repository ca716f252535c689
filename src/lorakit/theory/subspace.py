"""Directions: how far two subspaces agree, what of a change the base already had, and which directions it never had.

Each comes with the value that random directions give.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import wide
from .spectrum import Factored

INTRUDER_TOP, INTRUDER_COSINE = 10, 0.5
"""The paper's and PEFT's choice: the 10 largest directions, cosine below 0.5."""


# --- two subspaces ------------------------------------------------------------------------------------------------------


class Similarity(NamedTuple):
    """phi in [0, 1], with its mean and deviation for independent random subspaces."""

    phi: float
    null: float
    null_sd: float


def similarity(U1: Tensor, U2: Tensor) -> Similarity:
    """Give φ = ||U1^T U2||_F^2 / min(i, j) for orthonormal U1 (n, i), U2 (n, j). Hu et al. 2106.09685, section 7.2."""
    (n, i), j = U1.shape, U2.shape[1]
    phi = float((wide(U1).T @ wide(U2)).square().sum()) / min(i, j)
    variance = 2 * i * j * (n - i) * (n - j) / ((n - 1) * (n + 2) * n**2)
    return Similarity(phi, max(i, j) / n, math.sqrt(variance) / min(i, j))


def principal_cosines(U1: Tensor, U2: Tensor) -> Tensor:
    """Give the cosines of the principal angles, descending, of orthonormal U1 (n, i), U2 (n, j): (min(i, j),)."""
    return torch.linalg.svdvals(wide(U1).T @ wide(U2)).clamp(max=1.0)


def cosine(D1: Factored, D2: Factored) -> float:
    """Give <ΔW1, ΔW2> / (||ΔW1|| ||ΔW2||) from the factors; NaN if one is zero. Random: 0 ± 1/sqrt(d k)."""
    inner = (D1.U.T @ D2.U * (D1.S[:, None] * D2.S) * (D1.V.T @ D2.V)).sum()
    sizes = float(D1.S.norm() * D2.S.norm())
    return float(inner) / sizes if sizes else math.nan


# --- a change and the base it changes -------------------------------------------------------------------------------------


class Amplification(NamedTuple):
    """||ΔW||_F / ||U^T W V||_F, and what random U and V would give."""

    factor: float
    null: float


def amplification(delta: Factored, weight: Tensor, top: int | None = None) -> Amplification:
    """Give ||ΔW||_F / ||U^T W V||_F for the first `top` directions of ΔW. LoRA paper, section 7.3.

    Random U, V: ||U^T W V||_F = q ||W||_F / sqrt(d k). High: the change adds what W hardly does; near 1: it re-scales what W
    does. There is no good or bad value.
    """
    q = len(delta.S) if top is None else min(top, len(delta.S))
    W = weight.detach()
    inside = wide(delta.U[:, :q]).T @ wide(_times(W, delta.V[:, :q]))
    size, whole = float(delta.S.norm()), float(torch.linalg.vector_norm(W, dtype=torch.float64))
    expected = amplification_null(W.shape[0], W.shape[1], q, whole)
    return Amplification(_over(size, float(inside.norm())), _over(size, expected))


def amplification_null(d: int, k: int, q: int, norm: float) -> float:
    """Give q ||W||_F / sqrt(d k), the root mean square of ||U^T W V||_F over random orthonormal U (d, q), V (k, q)."""
    return q * norm / math.sqrt(d * k)


def dominance(delta: Factored, weight: Tensor) -> Tensor:
    """Give σ_i / ||u_i^T W|| (q,) for each left direction of ΔW: above 1 the change outweighs W there. O(d k q), no SVD of W.

    A cheap test before `intruders`. Random u_i: ||u_i^T W|| = ||W||_F / sqrt d (`dominance_null`).
    """
    rows = torch.linalg.vector_norm(wide(_times(weight.detach().T, delta.U)), dim=0)
    return delta.S / rows.clamp_min(torch.finfo(rows.dtype).tiny)


def dominance_null(delta: Factored, weight: Tensor) -> float:
    """Give σ_1 sqrt d / ||W||_F: the largest dominance if the directions of ΔW had nothing to do with W."""
    whole = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
    return _over((float(delta.S[0]) if len(delta.S) else 0.0) * math.sqrt(weight.shape[0]), whole)


class Intruders(NamedTuple):
    """Directions among the top of W + ΔW that no single direction of W resembles."""

    cosines: Tensor
    """(top,) the best match of each of them among the left singular vectors of W."""
    attributable: int
    """Flagged, with at least half of their energy in the column space of ΔW: truly new."""
    smeared: int
    """Flagged only because W's own close directions were mixed."""

    @property
    def flagged(self) -> int:
        """Attributable and smeared together."""
        return self.attributable + self.smeared


def intruders(
    weight: Tensor, delta: Factored, top: int = INTRUDER_TOP, threshold: float = INTRUDER_COSINE
) -> Intruders:
    """Count left singular vectors u of W + ΔW among the `top` with max_j |<u, u_j(W)>| < threshold. Shuttleworth et al. 2410.21228.

    Two full SVDs of (d, k), in float32 at least. By definition a base direction, however minor, is never an intruder.
    """
    W = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    change = (delta.U * delta.S) @ delta.V.T
    before, _, _ = torch.linalg.svd(W, full_matrices=False)
    after, _, _ = torch.linalg.svd(W + change.to(W.dtype), full_matrices=False)
    u = after[:, :top]
    cosines = (before.T @ u).abs().amax(0)
    own = delta.U[:, float(delta.S[0] if len(delta.S) else 0) * 1e-12 < delta.S].to(W.dtype)
    flagged = cosines < threshold
    truly_new = (own.T @ u).square().sum(0) >= 0.5
    return Intruders(cosines, int((flagged & truly_new).sum()), int((flagged & ~truly_new).sum()))


def best_match_null(n: int, quantile: float = 0.5) -> float:
    """Give the quantile of max_j |<u, e_j>| of a random unit vector against n orthonormal ones: far below 0.5 for large n.

    From P(max < x) = erf(x sqrt(n/2))^n, entries of a random direction taken as independent normals of variance 1/n.
    """
    each = quantile ** (1 / n)
    return math.sqrt(2 / n) * float(torch.erfinv(torch.tensor(each, dtype=torch.float64)))


def _times(W: Tensor, V: Tensor) -> Tensor:
    """Multiply a base weight by a few directions, in the dtype of W if that is at least float32."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    return W.to(dtype) @ V.to(dtype)


def _over(a: float, b: float) -> float:
    return a / b if b else math.nan
