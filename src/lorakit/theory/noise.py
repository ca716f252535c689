"""Singular values of signal plus noise: what noise alone gives, what can be seen above it, and what is worth keeping.

For full-rank matrices with independent noise of deviation τ in every entry: averaged gradients, full fine-tuning deltas, the
source of an extraction. Never for a trained B·A, which has rank r by construction and no bulk: its null is in `nulls.py`.
Marchenko and Pastur 1967; Baik, Ben Arous and Peche 2005; Benaych-Georges and Nadakuditi 1103.2221; Gavish and Donoho 1305.5870.
β = min(d, k) / max(d, k); y is a singular value of the signal in units of τ sqrt(max(d, k)).
"""

import functools
import math

import torch
from torch import Tensor

from ._precision import wide


def edge(d: int, k: int, tau: float = 1.0) -> float:
    """Give τ (sqrt d + sqrt k), the largest singular value of noise alone for large d and k."""
    return tau * (math.sqrt(d) + math.sqrt(k))


def detection_edge(d: int, k: int, tau: float = 1.0) -> float:
    """Give τ (d k)^(1/4): below it a singular value of the signal leaves no trace in the spectrum (BBP)."""
    return tau * (d * k) ** 0.25


def observed(y: float, beta: float) -> float:
    """Give where a signal's singular value is seen, sqrt((y + 1/y)(y + β/y)), the noise edge 1 + sqrt β below detection."""
    return math.sqrt((y + 1 / y) * (y + beta / y)) if y**4 > beta else 1 + math.sqrt(beta)


def hard_threshold(beta: float) -> float:
    """Give λ*(β) = sqrt(2(β + 1) + 8β / ((β + 1) + sqrt(β^2 + 14β + 1))): keep observed values above λ* τ sqrt(max(d, k))."""
    return math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))


@functools.lru_cache(maxsize=128)
def median(beta: float) -> float:
    """Give the median of the Marchenko-Pastur law of noise eigenvalues (squared singular values over τ^2 max(d, k))."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    left, right = low, high
    while right - left > 1e-13 * high:
        middle = (left + right) / 2
        left, right = (left, middle) if _mass_below(middle, beta) > 0.5 else (middle, right)
    return (left + right) / 2


def omega(beta: float) -> float:
    """Give ω(β) = λ*(β) / sqrt(median): the threshold is ω times the median singular value, if τ is not known."""
    return hard_threshold(beta) / math.sqrt(median(beta))


def keep_cost(y: float, beta: float = 1.0) -> float:
    """Give the squared error of keeping one component as observed, in units of τ^2 max(d, k); dropping it costs y^2.

    ŷ^2 + y^2 - 2 ŷ y c, c the product of the cosines between the observed and the true vectors; 2 + 3/y^2 at β = 1, so keep
    iff y > sqrt3, and not from sqrt2 as r (d + k) τ^2 says, which forgets that near the edge the directions are wrong.
    """
    seen = observed(y, beta)
    if y**4 <= beta:
        return seen**2 + y**2
    left, right = (y**4 - beta) / (y**4 + beta * y**2), (y**4 - beta) / (y**4 + y**2)
    return seen**2 + y**2 - 2 * seen * y * math.sqrt(left * right)


def risk(sigma: Tensor, r: int, tau: float, d: int, k: int) -> float:
    """Give sum_{i>r} σ_i^2 + τ^2 r (d + k - r): the risk of rank r if the r directions were known. An idealisation."""
    return float(wide(sigma)[r:].square().sum()) + tau**2 * r * (d + k - r)


def power_law_rank(constant: float, exponent: float, noise: float) -> float:
    """Give r* = (C^2 / noise)^(1/2a) for σ_i = C i^-a and noise = (d + k) τ^2. For intuition, never as advice."""
    return (constant**2 / noise) ** (1 / (2 * exponent))


def _mass_below(x: float, beta: float) -> float:
    """Integrate the law up to x. With t = mid - half cos φ the integrand is smooth up to both ends, and Simpson's rule is exact."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    mid, half = (low + high) / 2, (high - low) / 2
    top = math.acos(max(-1.0, min(1.0, (mid - x) / half)))
    phi = torch.linspace(0, top, 2049, dtype=torch.float64)
    # sin^2 φ / t has a limit at φ = 0 also for β = 1, where t is 0 there: (1 + cos φ) / half.
    inside = (half * phi.sin()).square() / (mid - half * phi.cos()) if beta < 1 else half * (1 + phi.cos())
    weights = torch.full_like(phi, 2.0)
    weights[1::2] = 4.0
    weights[0] = weights[-1] = 1.0
    return float((weights * inside).sum()) * top / (3 * 2048) / (2 * math.pi * beta)
