"""Second derivatives in the factors: the exact spectrum of the bilinear problem, Lanczos, Hutchinson, and the thresholds.

For f = 1/2 ||s·B·A - M||_F^2 at a critical point B A = the triplets S of M, balanced, everything is known: see
`bilinear_spectrum`. On a real loss only H v is to be had, by double backward or by differences of gradients.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import wide

Matvec = Callable[[Tensor], Tensor]


def bilinear_spectrum(
    sigma: Sequence[float], kept: Iterable[int], d: int, k: int, r: int, scale: float = 1.0
) -> Tensor:
    """Give the r (d + k) Hessian eigenvalues, ascending, of 1/2 ||s·B·A - M||_F^2 at the critical point that keeps `kept`.

    sigma: all min(d, k) singular values of M (d, k), zeros included; kept: indices of at most r nonzero ones. Balanced factors.
    Each pair kept i, j: s (σ_i + σ_j) and a zero (the gauge). Kept i, missing j: s (σ_i ± σ_j). Kept i and what of the
    longer side is left: s σ_i. An empty slot and missing j: ± s σ_j. At the optimum all j are zero: r^2 times 0, so that
    there is no strong convexity; with any missing σ_j > σ_i, or an empty slot, the point is a strict saddle.
    """
    kept = sorted(set(kept))
    missing = [sigma[j] for j in range(min(d, k)) if j not in kept]
    empty, longer = r - len(kept), abs(d - k)
    values = [sigma[i] + sigma[j] for i in kept for j in kept] + [0.0] * len(kept) ** 2
    values += [sigma[i] + sign * m for i in kept for m in missing for sign in (1, -1)]
    values += [sigma[i] for i in kept for _ in range(longer)]
    values += [sign * m for _ in range(empty) for m in missing for sign in (1, -1)]
    values += [0.0] * (r * (d + k) - len(values))  # an empty slot moves nothing along kept directions
    return scale * torch.tensor(sorted(values), dtype=torch.float64)


def quadratic_form(A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float, G: Tensor, hessian_W: Matvec) -> float:
    """Give v^T H v of a loss in the factors for v = (dA, dB): s^2 z^T H_W z + 2 s <G, dB dA>, z = dB A + B dA.

    G = dL/dW (d, k); hessian_W: (d, k) -> (d, k). At B = 0 only the second term is left for dA: indefinite where G != 0.
    """
    z = wide(dB) @ wide(A) + wide(B) @ wide(dA)
    return float(scale**2 * (z * hessian_W(z)).sum() + 2 * scale * (wide(G) * (wide(dB) @ wide(dA))).sum())


def difference_hvp(gradient: Matvec, at: Tensor, v: Tensor, eps: float | None = None) -> Tensor:
    """Give H v = (g(θ + e v) - g(θ - e v)) / 2e, error O(e^2). Works where double backward does not (flash attention, NF4).

    e = eps^(1/3) max(1, ||θ||) / ||v|| unless given, eps that of θ's dtype.
    """
    e = eps or torch.finfo(at.dtype).eps ** (1 / 3) * max(1.0, float(at.norm())) / max(float(v.norm()), 1e-300)
    return (gradient(at + e * v) - gradient(at - e * v)) / (2 * e)


def preconditioned(matvec: Matvec, diagonal: Tensor) -> Matvec:
    """Give P^-1/2 H P^-1/2 for P = diag(diagonal), which has the eigenvalues of P^-1 H and is symmetric."""
    root = diagonal.sqrt()
    return lambda v: matvec(v / root) / root


class Lanczos(NamedTuple):
    """Ritz values, ascending, and for each a bound: some eigenvalue of H lies within `residual` of it."""

    values: Tensor
    residuals: Tensor
    steps: int


def lanczos(matvec: Matvec, start: Tensor, steps: int, tolerance: float = 1e-10) -> Lanczos:
    """Run Lanczos on a symmetric H from a start vector (n,), each new vector orthogonalised twice against all before.

    Extreme eigenvalues of both signs come first (power iteration gives only the largest magnitude, and H is indefinite).
    It stops when the Krylov space is used up: multiplicities are invisible, so an H with m distinct eigenvalues stops after
    m steps. Memory: steps vectors.
    """
    basis = [start / start.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(steps, start.numel())):
        w = matvec(basis[-1])
        alphas.append(float(w @ basis[-1]))
        stacked = torch.stack(basis)
        for _ in range(2):
            w = w - stacked.T @ (stacked @ w)
        betas.append(float(w.norm()))
        if betas[-1] <= tolerance * max(map(abs, alphas + betas)):
            break
        basis.append(w / betas[-1])
    m = len(alphas)
    T = torch.tensor(alphas, dtype=torch.float64).diag()
    off = torch.tensor(betas[: m - 1], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(T + off.diag(1) + off.diag(-1))
    return Lanczos(values, betas[-1] * vectors[-1].abs(), m)


class Trace(NamedTuple):
    """A stochastic trace with its standard error."""

    mean: float
    se: float
    n: int


def hutchinson(matvec: Matvec, like: Tensor, probes: int, generator: torch.Generator | None = None) -> Trace:
    """Estimate tr(H) by v^T H v over random signs v. Variance of one: 2 (||H||_F^2 - sum H_ii^2). Hutchinson 1990."""
    values = []
    for _ in range(probes):
        v = torch.randint(0, 2, like.shape, generator=generator, device="cpu").to(like) * 2 - 1
        values.append(float(v @ matvec(v)))
    mean = math.fsum(values) / probes
    variance = math.fsum((x - mean) ** 2 for x in values) / max(probes - 1, 1)
    return Trace(mean, math.sqrt(variance / probes), probes)


# --- thresholds -------------------------------------------------------------------------------------------------------


def gd_threshold(lr: float) -> float:
    """Give 2/lr: gradient descent on a quadratic diverges along eigenvalues above it."""
    return 2 / lr


def adam_threshold(lr: float, beta1: float = 0.9) -> float:
    """Give (2 + 2 β1) / ((1 - β1) lr), 38/lr at β1 = 0.9: the same for Adam, of the eigenvalues of P^-1 H with
    P = diag(sqrt(v) + eps). Exact for momentum as a running mean on a quadratic; v moves slowly. Cohen et al. 2207.14484.
    """
    return (2 + 2 * beta1) / ((1 - beta1) * lr)
