"""Spectra, truncation, gauge, rounding: T1 to T3, T22, T25, T30."""

import math

import torch

from .. import gauge, measures, rounding
from .. import spectrum as sp
from ..number import Kind
from .outcome import Outcome, Where, largest

F1 = [[3.0, 0.0], [4.0, 5.0]]
"""σ = (3 sqrt5, sqrt5)."""


def fixture(where: Where) -> Outcome:
    """T1: every statistic of [[3, 0], [4, 5]]."""
    S = sp.singular_values(where.tensor([[1.0, 0.0], [0.0, 1.0]]), where.tensor(F1))
    root = math.sqrt(5)
    expected = (
        3 * root,
        root,
        math.sqrt(50),
        4 * root,
        3.0,
        50 / 45,
        1.7547653506033232,
        1.3841454884616857,
        2500 / 2050,
    )
    measured = (
        float(S[0]),
        float(S[1]),
        sp.frobenius(S),
        sp.nuclear(S),
        sp.condition(S, 2, 2),
        sp.stable_rank(S),
        sp.effective_rank(S),
        sp.energy_effective_rank(S),
        sp.participation(S),
    )
    return Outcome(expected, measured)


def truncation(where: Where) -> Outcome:
    """T2: the errors of the best rank 2 of σ = (5, 3, 1, 1/2) in three norms, and that the truncated factors attain them."""
    sigma = where.tensor([5.0, 3.0, 1.0, 0.5])
    B, A = where.basis(30, 4, seed=1) * sigma, where.basis(20, 4, seed=2).T
    found = sp.svd(A, B)
    A2, B2 = sp.truncated(found, 2, scale=0.5)
    attained = float(torch.linalg.matrix_norm((B @ A).double() - 0.5 * (B2 @ A2)))
    return Outcome((1.25**0.5, 1.0, 1.5, 1.25**0.5), (*sp.truncation_error(found.S, 2), attained))


def small_singular_values(where: Where) -> Outcome:
    """T3: σ = 10^0 .. 10^-14 from QR to 1e-9 of each, where the Gram matrix has lost those from 10^-10 on."""
    sigma = 10.0 ** -where.tensor([float(i) for i in range(15)])
    B, A = where.basis(60, 15, seed=3) * sigma.sqrt(), sigma.sqrt()[:, None] * where.basis(40, 15, seed=4).T
    by_qr = largest((sp.singular_values(A, B) - sigma) / sigma)
    dense = B @ A
    by_gram = torch.linalg.eigvalsh(dense.T @ dense).flip(0)[:15].clamp_min(0).sqrt()
    lost = bool((((by_gram - sigma) / sigma).abs()[10:] > 0.1).all())
    return Outcome((0.0, 1.0), (by_qr, float(lost)), tolerance=1e-9)


def rounding_closed_form(where: Where) -> Outcome:
    """T22: c(t) and e(t) at the values of the table, and ulp at 1 and 0.02."""
    t = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    ulp = rounding.ulp(where.tensor([1.0, 0.02]), torch.bfloat16)
    measured = (*rounding.retained(t).tolist(), *rounding.relative_error(t).tolist(), *ulp.tolist())
    expected = (0.17528, 0.66319, 0.98562, 0.9798, 0.8577, 0.5748, 2.0**-7, 2.0**-13)
    return Outcome(expected, measured, tolerance=5e-5)


def rounding_measured(where: Where) -> Outcome:
    """T22b: bfloat16 on this device loses of a random change what the closed form says."""
    W = (0.02 * where.randn(512, 512, seed=5)).to(torch.bfloat16)
    expected, measured = [], []
    for size in (2e-6, 2e-5, 1e-4):
        delta = size * where.randn(512, 512, seed=6)
        expected += list(
            rounding.predict(float(delta.double().square().mean().sqrt()), *rounding.ulp_histogram(W, torch.bfloat16))
        )
        measured += list(rounding.measure(W, delta, torch.bfloat16))
    return Outcome(tuple(expected), tuple(measured), tolerance=0.012)


def nuclear(where: Where) -> Outcome:
    """T25: (||A||^2 + ||B||^2)/2 is ||ΔW||_* where balanced, 26 for (F1, I); what weight decay leaves."""
    eye, M = where.tensor([[1.0, 0.0], [0.0, 1.0]]), where.tensor(F1)
    S = sp.nuclear(sp.singular_values(eye, M))
    A, B = gauge.rebalance(eye, M)
    lrs = [2e-4 * (1 - step / 1000) for step in range(1000)]
    measured = (
        gauge.nuclear_gap(A, B) * S,
        gauge.nuclear_gap(eye, M) * S,
        gauge.imbalance(A, B),
        largest(B @ A - M.double()),
        gauge.decay_survival(lrs, 0.01),
    )
    return Outcome((4 * math.sqrt(5), 26.0, 0.0, 0.0, math.exp(-0.001001)), measured, tolerance=1e-9)


def gauge_invariance(where: Where) -> Outcome:
    """T30: every EXACT number of an adapter is the same for (B R, R^-1 A); the imbalance is not."""
    A, B, R = where.randn(4, 24, seed=7), where.randn(30, 4, seed=8), where.randn(4, 4, seed=9)
    A2, B2 = gauge.transform(A, B, R)
    one, other = measures.of_factors(A, B, 0.5), measures.of_factors(A2, B2, 0.5)
    exact = [name for name, number in one.items() if number.kind is Kind.EXACT]
    W = where.randn(30, 24, seed=10)
    base, moved = (measures.with_base(sp.svd(a, b, 0.5), W) for a, b in ((A, B), (A2, B2)))
    pairs = [(one[n].value, other[n].value) for n in exact] + [(base[n].value, moved[n].value) for n in base]
    apart = max(abs(x - y) / max(1.0, abs(x)) for x, y in pairs)
    changed = abs(one["imbalance"].value - other["imbalance"].value) > 0.01
    return Outcome((0.0, 1.0, 13.0), (apart, float(changed), float(len(exact))), tolerance=1e-10)
