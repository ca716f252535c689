"""Laws of the formulas for any factors: what the closed forms of the self-test hold at one point, here at drawn ones."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorakit.theory import curvature, gain, gauge, gradients, measures, noise, nulls, probe, rounding, subspace
from lorakit.theory import spectrum as sp
from lorakit.theory.coding import water_filling
from lorakit.theory.number import Kind

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
SEEDS = st.integers(0, 10_000)
SCALES = st.sampled_from([0.125, 1.0, 2.0, 7.3])


def draw(shape: tuple[int, int, int], seed: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    d, k, r = shape
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, k, generator=generator, dtype=torch.float64)
    B = torch.randn(d, r, generator=generator, dtype=torch.float64)
    if rank is not None:
        A[rank:] = A[:rank].sum(0) if rank else 0.0
    return A, B


@settings(max_examples=60, deadline=None)
@given(SHAPES, SEEDS, SCALES)
def test_the_factors_have_the_singular_values_of_the_dense_change(
    shape: tuple[int, int, int], seed: int, scale: float
) -> None:
    A, B = draw(shape, seed)
    dense = scale * (B @ A)
    exact = torch.linalg.svdvals(dense)
    S = sp.singular_values(A, B, scale)
    assert len(S) == min(shape)
    assert torch.allclose(S, exact[: len(S)], atol=1e-12 * float(exact[0]), rtol=1e-10)
    U, S, V = sp.svd(A, B, scale)
    assert torch.allclose((U * S) @ V.T, dense, atol=1e-12 * float(exact[0]))
    assert torch.allclose(U.T @ U, torch.eye(len(S), dtype=U.dtype), atol=1e-12)
    for q in range(len(S) + 1):
        A_q, B_q = sp.truncated(sp.Factored(U, S, V), q, scale)
        left = torch.linalg.svdvals(dense - scale * (B_q @ A_q))
        error = sp.truncation_error(S, q)
        assert error.frobenius == pytest.approx(float(left.norm()), abs=1e-11 * float(exact[0]))
        assert error.spectral == pytest.approx(float(left[0]), abs=1e-11 * float(exact[0]))
        assert error.nuclear == pytest.approx(float(left.sum()), abs=1e-10 * float(exact[0]))


@settings(max_examples=60, deadline=None)
@given(SHAPES, SEEDS, SCALES)
def test_every_exact_number_is_invariant_under_the_gauge(shape: tuple[int, int, int], seed: int, scale: float) -> None:
    """(B R, R^-1 A) is the same change: to 1e-10 for every EXACT number, with and without a base."""
    A, B = draw(shape, seed)
    d, k, r = shape
    generator = torch.Generator().manual_seed(seed + 1)
    Q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))
    stretch = torch.logspace(-1, 1, r, dtype=torch.float64)  # an ill-balanced pair, condition 100
    A2, B2 = gauge.transform(A, B, Q * stretch)
    W = torch.randn(d, k, generator=generator, dtype=torch.float64)

    def exact(A: Tensor, B: Tensor) -> dict[str, float]:
        delta = sp.svd(A, B, scale)
        found = {**measures.of_factors(A, B, scale), **measures.with_base(delta, W), **measures.intruding(delta, W)}
        return {name: number.value for name, number in found.items() if number.kind is Kind.EXACT}

    one, other = exact(A, B), exact(A2, B2)
    S = sp.singular_values(A, B, scale)
    # Dominance is a ratio of each single direction: where two singular values meet, the directions are not determined.
    apart = len(S) < 2 or float((S[:-1] - S[1:]).min()) > 1e-3 * float(S[0])
    assert len(one) >= 15
    for name in one:
        tolerance = 1e-10 * (max(1.0, one["condition"]) if name in ("condition", "dominance") else 1)
        if name not in ("dominance", "amplification") or apart:
            assert other[name] == pytest.approx(one[name], rel=tolerance, abs=1e-12), name


@settings(max_examples=40, deadline=None)
@given(SHAPES, SEEDS)
def test_rebalancing_keeps_the_change_and_makes_the_nuclear_norm_of_half_the_squares(
    shape: tuple[int, int, int], seed: int
) -> None:
    A, B = draw(shape, seed)
    A2, B2 = gauge.rebalance(A, B)
    assert A2.shape == A.shape and B2.shape == B.shape
    assert torch.allclose(B2 @ A2, B @ A, atol=1e-11)
    assert gauge.imbalance(A2, B2) < 1e-12
    assert gauge.nuclear_gap(A2, B2) == pytest.approx(1.0, rel=1e-10)
    assert gauge.nuclear_gap(A, B) >= 1 - 1e-12


@settings(max_examples=30, deadline=None)
@given(SHAPES, SEEDS, st.integers(0, 4))
def test_ranks_of_a_deficient_change(shape: tuple[int, int, int], seed: int, rank: int) -> None:
    d, k, r = shape
    A, B = draw(shape, seed, rank)
    true = min(d, k, r, rank) if rank < r else min(d, k, r)
    S = sp.singular_values(A, B)
    assert sp.numerical_rank(S, d, k) == true
    if true:
        order = [sp.stable_rank(S), sp.participation(S), sp.energy_effective_rank(S), sp.effective_rank(S)]
        assert 1 - 1e-12 <= order[0] <= true + 1e-9 and order[1] <= order[2] * (1 + 1e-9) <= true + 1e-6
        assert sp.energy_rank(S, 1.0) <= len(S)
        assert sp.condition(S, d, k) >= 1 - 1e-12
    else:
        assert math.isnan(sp.stable_rank(S)) and math.isnan(sp.effective_rank(S)) and sp.energy_rank(S, 0.9) == 0


def test_numbers_of_an_untrained_change_are_not_made_up() -> None:
    numbers = measures.of_factors(torch.randn(4, 9), torch.zeros(7, 4), 2.0)
    assert numbers["frobenius"].value == 0 and numbers["energy_rank_90"].value == 0
    assert all(
        numbers[name].json()["value"] is None
        for name in ("stable_rank", "effective_rank", "participation", "condition")
    )
    assert set(measures.with_base(sp.svd(torch.randn(4, 9), torch.zeros(7, 4)), torch.randn(7, 9))) == {"relative_norm"}


@pytest.mark.parametrize("shape", [(4096, 4096, 16), (14336, 4096, 64), (5, 3, 8)])
def test_the_null_of_random_factors(shape: tuple[int, int, int]) -> None:
    """Against the closed forms: sum of squares shares by concentration, and the range of ranks."""
    null = nulls.random_factors(*shape)
    r = min(shape)
    assert 1 <= null.stable_rank <= null.participation <= null.effective_rank <= r
    assert math.hypot(*null.spectrum) == pytest.approx(1.0, rel=0.02)
    assert len(null.spectrum) == r
    if shape == (4096, 4096, 16):  # figures of one draw in the notes: erank 15.98, stable 13.96, k90 15, k99 16
        assert null.effective_rank == pytest.approx(15.98, abs=0.01) and null.stable_rank == pytest.approx(
            13.96, abs=0.5
        )
        assert (null.energy_rank_90, null.energy_rank_99) == (15, 16)
    assert nulls.noise_condition(4096, 16) == pytest.approx(1.133, abs=5e-4)


# --- rounding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    x = torch.cat(
        [torch.randn(500) * 10.0 ** torch.arange(-8, 2).repeat_interleave(50), torch.tensor([0.0, 1.0, 2.0, 0.02])]
    ).to(dtype)
    next_one = torch.nextafter(x.abs(), torch.full_like(x, torch.inf))
    assert torch.equal(rounding.ulp(x, dtype), next_one.double() - x.abs().double())


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 4.0), SEEDS)
def test_the_closed_form_of_rounding_is_what_a_monte_carlo_gives(t: float, seed: int) -> None:
    x = t * torch.randn(400_000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    seen = rounding.compare(x.round(), x)
    assert float(rounding.retained(t)) == pytest.approx(seen.retained, abs=6e-3)
    assert float(rounding.relative_error(t)) == pytest.approx(seen.error, abs=6e-3)
    assert float(rounding.unchanged(t)) == pytest.approx(seen.unchanged, abs=6e-3)


def test_storage_error_is_that_of_the_dense_product() -> None:
    A, B = draw((512, 512, 16), 0)
    dense = B @ A
    for dtype, about in ((torch.bfloat16, 0.00238), (torch.float16, 0.00029)):
        stored = B.to(dtype).double() @ A.to(dtype).double()
        assert rounding.storage_error(A, B, dtype) == pytest.approx(
            float((stored - dense).norm() / dense.norm()), rel=1e-9
        )
        assert rounding.storage_error(A, B, dtype) == pytest.approx(about, rel=0.03)
        assert rounding.storage_floor(dtype) == pytest.approx(about, rel=0.03)
    assert rounding.storage_error(A.to(torch.bfloat16), B.to(torch.bfloat16), torch.bfloat16) == 0


# --- gradients, curvature -----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 3), st.data(), SCALES)
def test_the_spectrum_of_the_bilinear_hessian(d: int, k: int, r: int, data: st.DataObject, scale: float) -> None:
    """Closed form against autograd at every kind of critical point, empty slots included."""
    n = min(d, k)
    sigma = sorted(data.draw(st.lists(st.floats(0.5, 4.0), min_size=n, max_size=n)), reverse=True)
    kept = sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=min(r, n))))
    M, A, B = (torch.zeros(*s, dtype=torch.float64) for s in ((d, k), (r, k), (d, r)))
    for i, value in enumerate(sigma):
        M[i, i] = value
    for slot, i in enumerate(kept):
        A[slot, i] = B[i, slot] = math.sqrt(sigma[i] / scale)

    def loss(flat: Tensor) -> Tensor:
        return (scale * flat[r * k :].view(d, r) @ flat[: r * k].view(r, k) - M).square().sum() / 2

    H = torch.autograd.functional.hessian(loss, torch.cat([A.flatten(), B.flatten()]))
    expected = curvature.bilinear_spectrum(sigma, kept, d, k, r, scale)
    assert len(expected) == r * (d + k)
    assert torch.allclose(torch.linalg.eigvalsh(H), expected, atol=1e-9 * scale)


def test_the_quadratic_form_and_difference_of_gradients_are_the_hessian() -> None:
    A, B = draw((4, 5, 2), 0)
    x, labels = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 4
    scale = 1.5

    def of_weight(W: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x @ W.T, labels)

    def of_factors(flat: Tensor) -> Tensor:
        return of_weight(scale * flat[10:].view(4, 2) @ flat[:10].view(2, 5))

    flat, v = torch.cat([A.flatten(), B.flatten()]), torch.randn(18, dtype=torch.float64)
    exact = torch.autograd.functional.hessian(of_factors, flat) @ v
    W = scale * (B @ A)
    G = torch.autograd.functional.jacobian(of_weight, W)
    H_W = torch.autograd.functional.hessian(of_weight, W)
    form = curvature.quadratic_form(
        A, B, v[:10].view(2, 5), v[10:].view(4, 2), scale, G, lambda z: torch.einsum("abcd,cd", H_W, z)
    )
    assert form == pytest.approx(float(v @ exact), rel=1e-10)
    by_difference = curvature.difference_hvp(lambda t: torch.autograd.functional.jacobian(of_factors, t), flat, v)
    assert torch.allclose(by_difference, exact, atol=1e-7)


def test_lanczos_finds_both_ends_and_bounds_its_error() -> None:
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    H = M + M.T
    exact = torch.linalg.eigvalsh(H)
    for steps in (8, 20, 60):
        found = curvature.lanczos(lambda v: H @ v, torch.randn(60, generator=generator, dtype=torch.float64), steps)
        nearest = (found.values[:, None] - exact).abs().amin(1)
        assert bool((nearest <= found.residuals + 1e-10).all())
    assert torch.allclose(found.values, exact, atol=1e-9)
    P = torch.rand(60, generator=generator, dtype=torch.float64) + 0.1
    whole = curvature.lanczos(curvature.preconditioned(lambda v: H @ v, P), torch.ones(60, dtype=torch.float64), 60)
    assert float(whole.values[-1]) == pytest.approx(float(torch.linalg.eigvals(H / P[:, None]).real.max()), rel=1e-8)


def test_component_sensitivities_of_a_deficient_adapter_are_finite() -> None:
    A, B = draw((6, 5, 3), 1, rank=2)
    S, values = gradients.component_sensitivities(A, B, torch.randn(6, 3, dtype=torch.float64), 2.0)
    assert bool(torch.isfinite(values[:2]).all()) and float(S[2]) < 1e-12


def test_noise_scale_of_two_micro_batches_is_that_of_two_halves() -> None:
    G1, G2 = draw((6, 5, 6), 2)[1], draw((6, 5, 6), 3)[1]
    halves, batches = gain.noise_scale(G1, G2, 16), gain.noise_scale_of([G1, G2], 8)
    assert batches.signal == pytest.approx(halves.signal) and batches.noise == pytest.approx(halves.noise)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(50, generator=generator, dtype=torch.float64)
    found = [
        gain.noise_scale_of([mean + torch.randn(50, generator=generator, dtype=torch.float64) / 2 for _ in range(4)], 4)
        for _ in range(300)
    ]
    assert sum(f.signal for f in found) / 300 == pytest.approx(float(mean @ mean), rel=0.03)
    assert sum(f.noise for f in found) / 300 == pytest.approx(
        50.0, rel=0.03
    )  # 50 coordinates of one sample's variance 1


def test_the_first_step_of_adam_is_the_predicted_one() -> None:
    d, k, r, alpha, lr = 300, 256, 8, 16.0, 2e-4
    for scale in (alpha / r, alpha / r**0.5):
        A = torch.empty(r, k).uniform_(-(k**-0.5), k**-0.5, generator=torch.Generator().manual_seed(0))
        B = torch.zeros(d, r, requires_grad=True)
        B.grad = scale * torch.randn(d, k, generator=torch.Generator().manual_seed(1)) @ A.T
        torch.optim.Adam([B], lr=lr).step()
        moved = float(torch.linalg.matrix_norm(scale * B.detach() @ A))
        assert moved == pytest.approx(gradients.adam_first_update(d, r, scale, lr), rel=0.05)
    assert gradients.adam_first_update(d, 64, alpha / 8, lr) == pytest.approx(
        alpha * lr * math.sqrt(d / 3)
    )  # rsLoRA: no r
    assert gradients.sgd_effective_rate(k, r, 2.0, lr) == pytest.approx(lr * 4 * r / (3 * k))


# --- noise, coding, directions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1])
def test_thresholds_against_random_matrices(beta: float) -> None:
    d, y, draws = 300, 2.2, 10
    k = int(beta * d)
    signal = torch.zeros(d, k, dtype=torch.float64)
    signal[0, 0] = y * math.sqrt(d)
    medians, edges, seen, costs = [], [], [], []
    for seed in range(draws):
        noisy = torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        S = torch.linalg.svdvals(noisy) / math.sqrt(d)
        medians.append(float(S.square().median()))
        edges.append(float(S[0]))
        U, S, vh = torch.linalg.svd(noisy + signal, full_matrices=False)
        seen.append(float(S[0]) / math.sqrt(d))
        costs.append(float((S[0] * U[:, :1] @ vh[:1] - signal).square().sum()) / d)
    mean = [sum(values) / draws for values in (medians, edges, seen, costs)]
    assert mean[0] == pytest.approx(noise.median(beta), rel=0.03)
    assert mean[1] == pytest.approx(noise.edge(d, k) / math.sqrt(d), rel=0.02)
    assert mean[2] == pytest.approx(noise.observed(y, beta), rel=0.02)
    assert mean[3] == pytest.approx(noise.keep_cost(y, beta), rel=0.05)
    assert noise.observed(0.9 * beta**0.25, beta) == pytest.approx(1 + math.sqrt(beta))


def test_the_hard_threshold_is_where_keeping_and_dropping_cost_the_same() -> None:
    for beta in (1.0, 0.5, 0.1):
        low, high = beta**0.25, 3.0
        for _ in range(80):
            y = (low + high) / 2
            low, high = (y, high) if noise.keep_cost(y, beta) > y**2 else (low, y)
        assert noise.observed(low, beta) == pytest.approx(noise.hard_threshold(beta), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 50.0), min_size=1, max_size=8), st.floats(0.02, 0.98))
def test_water_filling_meets_its_distortion_with_the_least_rate(variances: list[float], share: float) -> None:
    values = torch.tensor(variances, dtype=torch.float64)
    distortion = share * float(values.sum())
    found = water_filling(values, distortion)
    spent = torch.minimum(torch.full_like(values, found.theta), values)
    assert float(spent.sum()) == pytest.approx(distortion, rel=1e-9)
    assert found.rate == pytest.approx(float(found.rates.sum()))
    for i, j in itertools.permutations(range(len(values)), 2):  # moving distortion from one to another saves nothing
        moved = spent.clone()
        step = 0.01 * float(spent[i])
        moved[i] -= step
        moved[j] += step
        if float(moved[j]) <= float(values[j]):
            assert float((values / moved).log2().sum() / 2) >= found.rate - 1e-9


def test_cosine_of_two_changes_from_their_factors() -> None:
    (A1, B1), (A2, B2) = draw((9, 7, 3), 0), draw((9, 7, 2), 1)
    D1, D2 = 2 * B1 @ A1, B2 @ A2
    expected = float((D1 * D2).sum() / (D1.norm() * D2.norm()))
    assert subspace.cosine(sp.svd(A1, B1, 2.0), sp.svd(A2, B2)) == pytest.approx(expected, rel=1e-10)
    U = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64))[0]
    assert torch.allclose(
        subspace.principal_cosines(U[:, :4], U[:, 2:]),
        torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64),
        atol=1e-8,
    )


def test_an_update_of_rank_16_has_at_most_16_attributable_intruders() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(160, 120, generator=generator, dtype=torch.float64)
    A, B = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((4, 120), (160, 4)))
    delta = sp.svd(A, B, 0.6)
    found = subspace.intruders(W, delta, top=100)
    assert found.attributable <= 4 and found.smeared > 4  # mixing of near directions, not new ones
    assert len(found.cosines) == 100


def test_the_band_of_the_probe_holds_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mean = (
        torch.linalg.qr(randn(30, 3))[0]
        * torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
        @ torch.linalg.qr(randn(20, 3))[0].T
    )
    inside = 0
    for _ in range(20):
        G1 = mean + 0.1 * randn(30, 20)
        each = mean + 1.0 * randn(64, 30, 20)
        U, s, vh = torch.linalg.svd(G1, full_matrices=False)
        cross = torch.einsum("dq,ndk,qk->nq", U[:, :6], each, vh[:6])
        signal = torch.einsum("dk,ndk->n", G1, each)
        low, high = probe.bootstrap(s[:6], cross, signal, draws=300)
        truth = probe.half(G1, mean, 6)
        captured = (truth.s * truth.cross).cumsum(0) / (G1 * mean).sum()
        inside += int((low[1] <= captured[1]) & (captured[1] <= high[1]))
        assert bool((low <= high).all())
    assert inside >= 15
    assert probe.Curve(torch.tensor([0.5, 0.92]), 1.0).smallest_rank() == 2
    assert probe.Curve(torch.tensor([0.5, 0.92]), -1.0).smallest_rank() is None
