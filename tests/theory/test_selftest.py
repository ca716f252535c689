"""The checks of `lorakit selftest`, one test each, and that they can fail."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lorakit.analysis.loader_check import LOADER
from lorakit.theory import curvature, flops, gauge, gradients, noise, rounding, smoothness, tails
from lorakit.theory.checks.outcome import Outcome, Where
from lorakit.theory.formulas import FORMULAS
from lorakit.theory.number import Kind, Number
from lorakit.theory.selftest import CHECKS, Check, selftest

ALL = (*CHECKS, LOADER)


@pytest.mark.parametrize("check", ALL, ids=lambda check: check.id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_formula_is_its_closed_form(check: Check, dtype: torch.dtype) -> None:
    (result,) = selftest([check], "cpu", dtype)
    assert result.error is None or result.ok is None, result.error
    assert result.ok in ((True,) if dtype == torch.float64 or not check.double else (None,)), result


def test_every_check_of_the_plan_is_there_and_every_formula_names_one() -> None:
    ids = [check.id for check in ALL]
    assert len(ids) == len(set(ids))
    assert {f"T{i}" for i in range(1, 33)} <= set(ids)
    assert {formula.test for formula in FORMULAS.values()} <= set(ids)
    assert all(check.what for check in ALL)


@pytest.mark.parametrize(
    ("name", "wrong", "fails"),
    [
        ("stable_rank", lambda S: float(S.sum() / S[0]), {"T1", "T1b"}),
        ("truncation_error", lambda S, q: (float(S[q]), float(S[q]), float(S[q])), {"T2"}),
    ],
)
def test_a_wrong_spectrum_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, wrong: object, fails: set[str]) -> None:
    monkeypatch.setattr(f"lorakit.theory.spectrum.{name}", wrong)
    found = {r.id for r in selftest([c for c in CHECKS if c.id in ("T1", "T1b", "T2", "T3")]) if not r.ok}
    assert found == fails


@pytest.mark.parametrize(
    ("module", "name", "wrong", "check"),
    [
        (gradients, "factor_gradients", lambda G, A, B, s: (B.T @ G, G @ A.T), "T5"),
        (gauge, "drift", lambda dA, dB, lr: 0 * dA @ dA.T, "T8"),
        (curvature, "adam_threshold", lambda lr, beta1=0.9: 2 / lr, "T13"),
        (rounding, "ulp", lambda W, dtype: torch.full(W.shape, torch.finfo(dtype).eps), "T22"),
        (flops, "compression", lambda d, k, r: d * k / (d * r), "T50"),
        (smoothness, "factor_curvature", lambda A, B, s, L, G: s * L, "T51"),
        (smoothness, "product_speed", lambda u, a, m: (a**2 + 2 * u) * (m - u), "T52"),
        (noise, "keep_cost", lambda y: 2.0, "T53"),
        (tails, "exponent", lambda x, least: tails.Tail(len(x) / float(x.log().sum()), 0.02, len(x)), "T54"),
    ],
)
def test_a_wrong_formula_is_caught(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, wrong: object, check: str
) -> None:
    monkeypatch.setattr(module, name, wrong)
    (result,) = selftest([c for c in CHECKS if c.id == check])
    assert result.ok is False


def test_a_check_that_raises_or_gives_nan_has_failed() -> None:
    def raises(where: Where) -> Outcome:
        """X: nothing."""
        raise RuntimeError("no such operation on this device")

    def gives_nan(where: Where) -> Outcome:
        """X: nothing."""
        return Outcome((1.0,), (math.nan,), tolerance=1e9)

    found = list(selftest([Check("X1", raises), Check("X2", gives_nan)]))
    assert [r.ok for r in found] == [False, False]
    assert "no such operation" in str(found[0].error)


def test_the_work_of_a_training_step_is_what_torch_counts() -> None:
    x = torch.randn(10, 64, requires_grad=True)
    W, A, B = torch.randn(96, 64), torch.randn(4, 64, requires_grad=True), torch.randn(96, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (x @ W.T + (x @ A.T) @ B.T).sum().backward()
    assert counter.get_total_flops() == 284160


def test_a_number_knows_its_formula() -> None:
    number = Number(
        3.0, Kind.ESTIMATE, "gain_ratio", null=1.0, interval=(2.5, math.inf), n=8, inputs={"lr": 1e-3}, cost=0.5
    )
    assert number.json() == {
        "value": 3.0,
        "kind": "estimate",
        "null": 1.0,
        "ci": [2.5, None],
        "n": 8,
        "inputs": {"lr": 1e-3},
        "cost": 0.5,
        "formula_id": "gain_ratio",
    }
    assert Number(math.nan, Kind.EXACT, "norm").json()["value"] is None
    with pytest.raises(KeyError, match="no formula"):
        Number(1.0, Kind.EXACT, "health_score")
