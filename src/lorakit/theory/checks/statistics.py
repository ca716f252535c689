"""Noise, directions, coding, bounds: T18 to T21, T23, T24, T26 to T29, T32."""

import math

import torch

from .. import coding, gain, noise, nulls, probe, retention, subspace
from .. import spectrum as sp
from .outcome import Outcome, Where, largest


def thresholds(where: Where) -> Outcome:
    """T18: λ*(1) = 4/sqrt3, ω at four shapes, and y = sqrt3 <-> 4/sqrt3."""
    measured = (noise.hard_threshold(1), *(noise.omega(b) for b in (1, 0.5, 0.25, 0.1)), noise.observed(3**0.5, 1))
    return Outcome((4 / 3**0.5, 2.858362, 2.171185, 1.836866, 1.608772, 4 / 3**0.5), measured, tolerance=1e-6)


def keep_cost(where: Where) -> Outcome:
    """T19: the error of keeping one noisy component, y = 2.5, d = 300, against 2 + 3/y^2; its two neighbours by formula."""
    d, y, draws = 300, 2.5, 12
    costs = []
    for seed in range(draws):
        signal = y * d**0.5 * where.basis(d, 1, seed=2 * seed) @ where.basis(d, 1, seed=2 * seed + 1).T
        U, S, vh = torch.linalg.svd(signal + where.randn(d, d, seed=500 + seed), full_matrices=False)
        costs.append(float((S[0] * U[:, :1] @ vh[:1] - signal).square().sum()) / d)
    mean = sum(costs) / draws
    return Outcome((1.0, 3.0, 2.48), (mean / 2.48, noise.keep_cost(3**0.5), noise.keep_cost(2.5)), tolerance=0.03)


def water_filling(where: Where) -> Outcome:
    """T20: (4, 1, 1/4) at distortion 5/4: θ = 1/2, two bits."""
    found = coding.water_filling(where.tensor([4.0, 1.0, 0.25]), 1.25)
    return Outcome((0.5, 2.0, 1.5, 0.5, 0.0), (found.theta, found.rate, *found.rates.tolist()))


def gaussian_channel(where: Where) -> Outcome:
    """T21: I(x; A x + noise) for A = diag(2, 1): half of ln 10."""
    eye = where.tensor([[1.0, 0.0], [0.0, 1.0]])
    return Outcome(
        (math.log(10) / 2,), (coding.gaussian_information(where.tensor([[2.0, 0.0], [0.0, 1.0]]), eye, 1.0),)
    )


def subspace_null(where: Where) -> Outcome:
    """T23: φ of random subspaces of 5 and 8 in 200 dimensions, mean and deviation; 1 for a subspace and itself."""
    draws = 400
    found = [subspace.similarity(where.basis(200, 5, 2 * i), where.basis(200, 8, 2 * i + 1)) for i in range(draws)]
    phi = torch.tensor([f.phi for f in found])
    U = where.basis(200, 5, seed=1)
    expected = (0.04, 0.0086, 0.04, 0.0086, 1.0)
    measured = (float(phi.mean()), float(phi.std()), found[0].null, found[0].null_sd, subspace.similarity(U, U).phi)
    return Outcome(expected, measured, tolerance=1.2e-3)


def amplification(where: Where) -> Outcome:
    """T24: the null of ||U^T W V|| gives the random column of the LoRA paper's table, and is what random directions give."""
    measured = [subspace.amplification_null(12288, 12288, q, 61.95) for q in (4, 64)]
    W = where.randn(120, 80, seed=1)
    ratios = []
    for seed in range(60):
        delta = sp.Factored(
            where.basis(120, 4, 2 * seed), where.tensor([4.0, 3.0, 2.0, 1.0]), where.basis(80, 4, 2 * seed + 1)
        )
        found = subspace.amplification(delta, W)
        ratios.append((found.null / found.factor) ** 2)
    mean = sum(ratios) / len(ratios)
    return Outcome((0.020166, 0.322656, 1.0), (*measured, round(mean, 1)), tolerance=1e-6)


def probe_curve(where: Where) -> Outcome:
    """T26: with equal halves the curve is the cumulative energy; with noise it follows the truth, where energy does not."""
    d, k, top, tau, draws = 120, 80, 16, 0.1, 24
    sigma = where.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.25])
    mean = where.basis(d, 6, seed=1) * sigma @ where.basis(k, 6, seed=2).T
    same = probe.cross_validated(mean, mean, 6)
    energy = sigma.double().square().cumsum(0) / sigma.double().square().sum()
    curves, oracles, signals = [], [], []
    for i in range(draws):
        G1, G2 = (mean + tau * where.randn(d, k, seed=10 + 2 * i + j) for j in (0, 1))
        found = probe.cross_validated(G1, G2, top)
        curves.append(found.captured)
        signals.append(gain.noise_scale(G1, G2, 2).signal)
        truths = [probe.half(G, mean, top) for G in (G1, G2)]
        oracles.append(probe.curve(truths, float(mean.double().square().sum())).captured)
    apart = torch.stack(curves).mean(0) - torch.stack(oracles).mean(0)
    naive = probe.energy_rank(G1) > 20
    return Outcome(
        (0.0, 0.0, 1.0, 1.0),
        (largest(same.captured - energy), largest(apart), float(naive), sum(signals) / draws / 30.3125),
        tolerance=0.02,
    )


def rademacher(where: Where) -> Outcome:
    """T27: six orthonormal features, rank 2, radius 1: sqrt2 / 6."""
    features = torch.stack([where.tensor([1.0 if j == i else 0.0 for j in range(6)]).diag() for i in range(6)])
    return Outcome((2**0.5 / 6,), (coding.rademacher(features, 2, 1.0),))


def intruders(where: Where) -> Outcome:
    """T28: no change, a planted new direction, a mixed one, and a raised base direction, which is none by definition."""

    def count(W: torch.Tensor, u: torch.Tensor, v: torch.Tensor, size: float) -> float:
        delta = sp.Factored(u[:, None], where.tensor([size]), v[:, None])
        return float(subspace.intruders(W, delta).flagged)

    tall = torch.zeros(20, 5, device=where.device, dtype=where.dtype)
    for i, value in enumerate((4.0, 3.0, 2.0, 1.0)):
        tall[i, i] = value
    unit = torch.eye(64, device=where.device, dtype=where.dtype)
    square = torch.diag(where.tensor([float(64 - i) for i in range(64)]))
    mixed = unit.sum(0) / 8
    measured = (
        count(square, mixed, mixed, 0.0),
        count(tall, unit[19, :20], unit[4, :5], 10.0),
        count(square, mixed, mixed, 1000.0),
        count(square, unit[63], unit[63], 1000.0),
        subspace.best_match_null(576),
    )
    return Outcome((0.0, 1.0, 1.0, 0.0, 0.136), measured, tolerance=2e-3)


def divergence(where: Where) -> Outcome:
    """T29: KL is zero, exactly, for equal logits, and 1/2 ln(4/3) from (1/2, 1/2) to (1/4, 3/4)."""
    logits = where.randn(7, 50, seed=1)
    even, uneven = where.tensor([[0.0, 0.0]]), where.tensor([[0.0, math.log(3)]])
    measured = (float(retention.kl(logits, logits).abs().max()), float(retention.kl(even, uneven)[0]))
    return Outcome((0.0, math.log(4 / 3) / 2), measured)


def bounds(where: Where) -> Outcome:
    """T32: the information bound of Llama-7B with r = 8 on q and v; an empty message; a predictor that learns nothing."""
    bound = coding.information_bound(4_194_304, 16, 50_000)
    flat = coding.excess_description_length([2.5] * 10, [100] * 10, 2.5)
    measured = (bound, coding.vacuity(bound), coding.occam_bound(0, 50, delta=math.exp(-1)), flat)
    return Outcome((21.5676, 21.5676, 0.1, 0.0), measured, tolerance=1e-4)


def null_of_factors(where: Where) -> Outcome:
    """T1b: the null drawn in O(r^3) is the mean over random factors of the shape themselves."""
    d, k, r, draws = 60, 40, 6, 200
    spectra = [
        sp.singular_values(where.randn(r, k, seed=2 * i), where.randn(d, r, seed=2 * i + 1)) for i in range(draws)
    ]
    null = nulls.random_factors(d, k, r)
    ranks = [sum(map(f, spectra)) / draws for f in (sp.stable_rank, sp.effective_rank, sp.participation)]
    return Outcome((null.stable_rank, null.effective_rank, null.participation), tuple(ranks), tolerance=0.15)
