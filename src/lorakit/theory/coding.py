"""Bits: what a run wrote into its adapter, how few bits an adapter needs, and the bounds that are true and say nothing.

`logs` are losses in nats as the trainer records them; a length is in bits unless it says nats.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import wide

LN2 = math.log(2)


# --- what training wrote ----------------------------------------------------------------------------------------------


def prequential(losses: Sequence[float], tokens: Sequence[int]) -> float:
    """Give sum_t L_t n_t / ln 2: bits to send the data with a model that learns on the way. Dawid 1984.

    Each loss must be of a batch that the model has not seen, before its update: first epoch only.
    """
    return math.fsum(loss * n for loss, n in zip(losses, tokens, strict=True)) / LN2


def excess_description_length(losses: Sequence[float], tokens: Sequence[int], final_loss: float) -> float:
    """Give sum_t (L_t - L_final) n_t / ln 2: bits that the run wrote into the adapter. Donoway et al. 2601.04728.

    final_loss: held-out, of the finished adapter. 0 for a model that learns nothing; after the first epoch it means nothing.
    """
    return prequential(losses, tokens) - final_loss * sum(tokens) / LN2


def two_part(nll: float, parameters: int, n: int) -> float:
    """Give nats of NLL + 1/2 (free parameters) ln n, Rissanen's two-part code; of ΔW, r (d + k - r) are free."""
    return nll + parameters / 2 * math.log(n)


# --- rate and distortion ----------------------------------------------------------------------------------------------


class WaterFilling(NamedTuple):
    """theta: distortion of each component above the water; rate: bits in all; rates: bits of each component."""

    theta: float
    rate: float
    rates: Tensor


def water_filling(variances: Tensor, distortion: float) -> WaterFilling:
    """Share a total squared error over components: D_i = min(θ, σ_i^2), R_i = max(0, 1/2 log2(σ_i^2 / θ)).

    θ with sum D_i = distortion, found exactly. For Gaussian components; report the measured error beside it. Cover and
    Thomas, theorem 10.3.3. variances (q,), the σ_i^2.
    """
    values = wide(variances)
    ordered = values.sort().values
    if distortion >= float(ordered.sum()):
        return WaterFilling(float(ordered[-1]), 0.0, torch.zeros_like(values))
    below = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)[:-1]])  # of the components under the water
    left = torch.arange(len(ordered), 0, -1, dtype=ordered.dtype, device=ordered.device)
    levels = (distortion - below) / left
    theta = float(levels[int((levels <= ordered).to(torch.int64).argmax())])
    rates = (values / theta).log2().clamp_min(0) / 2
    return WaterFilling(theta, float(rates.sum()), rates)


def gaussian_information(A: Tensor, Sigma: Tensor, noise: float) -> float:
    """Give I(x; A x + noise) = 1/2 ln det(I + A Σ A^T / ν^2) in nats. It depends on ν, which nobody knows: for teaching."""
    A, Sigma = wide(A), wide(Sigma)
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    return float(torch.linalg.slogdet(eye + A @ Sigma @ A.T / noise**2).logabsdet) / 2


# --- bounds on the generalisation gap -----------------------------------------------------------------------------------


def information_bound(parameters: int, bits: int, n: int, sub_gaussian: float = 0.5) -> float:
    """Give sqrt(2 σ^2 q ln2 p / n) for p trained numbers of q bits and n samples; σ = 1/2 for a loss in [0, 1].

    Mutual information is at most the adapter's size in nats. Zhu et al. 2402.16842 for LoRA; Xu and Raginsky 1705.07809.
    """
    return math.sqrt(2 * sub_gaussian**2 * LN2 * bits * parameters / n)


def occam_bound(bits: float, n: int, delta: float = 0.05) -> float:
    """Give sqrt((K ln2 + ln(1/δ)) / 2n) for a hypothesis written in K bits, loss in [0, 1], with probability 1 - δ."""
    return math.sqrt((bits * LN2 + math.log(1 / delta)) / (2 * n))


def vacuity(bound: float, trivial: float = 1.0) -> float:
    """Give bound / trivial: at 1 and above the bound says less than the loss's own range does."""
    return bound / trivial


def rademacher(features: Tensor, r: int, radius: float) -> float:
    """Give (F/n) E_ε ||sum ε_i X_i||_(r), exactly, over all 2^n signs: X (n, d, k), {rank <= r, ||W||_F <= F}, n <= 16.

    ||.||_(r) is the root of the sum of the r largest squared singular values.
    """
    X = wide(features)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(X))), dtype=X.dtype, device=X.device)
    S = torch.linalg.svdvals(torch.einsum("en,ndk->edk", signs, X))
    return radius / len(X) * float(S[:, :r].square().sum(1).sqrt().mean())
