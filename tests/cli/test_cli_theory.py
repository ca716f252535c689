"""`lorakit inspect` with a base and a page, and `lorakit selftest`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.theory.checks.outcome import Outcome, Where
from lorakit.theory.selftest import CHECKS


def test_inspect_measures_every_module_beside_its_null(
    lorakit: Callable, trained: Path, tiny_model: Path, tmp_path: Path
) -> None:
    done = lorakit("inspect", trained, "--base", tiny_model, "--intruders", "--json", "--html", tmp_path / "page.html")
    assert done.code == 0 and str(tmp_path / "page.html") in done.err
    found = json.loads(done.out)
    base = load_file(tiny_model / "model.safetensors")
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    path = "model.layers.1.mlp.up_proj"
    module = found["modules"][path]
    A, B = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
    delta, W = module["scale"] * (B @ A), base[f"{path}.weight"].double()
    rho = module["numbers"]["relative_norm"]
    assert rho["value"] == pytest.approx(float(delta.norm() / W.norm()), rel=1e-5)
    assert (rho["kind"], rho["formula_id"]) == ("exact", "relative_norm")
    assert module["numbers"]["effective_rank"]["null"] == pytest.approx(3.9, abs=0.15)
    assert module["spectrum"] == pytest.approx(torch.linalg.svdvals(delta)[:4].tolist(), rel=1e-6)
    assert "intruders_attributable" in module["numbers"] and found["verdicts"] == []
    assert 0.9 < found["numbers"]["decay_survival"]["value"] <= 1
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_inspect_prints_a_row_per_kind_of_module(lorakit: Callable, trained: Path, tiny_model: Path) -> None:
    out = lorakit("inspect", trained, "--base", tiny_model).out
    (row,) = [line for line in out.splitlines() if line.startswith("mlp.up_proj  ")]
    assert row.split()[:3] == ["mlp.up_proj", "3", "4"]
    assert (
        "eff. rank" in out and "rel. norm" in out and "dominance" in out and "not measured: effect on the loss" in out
    )
    done = lorakit("inspect", trained, "--intruders")
    assert done.code == 2 and "--base MODEL" in done.err


def test_inspect_says_what_it_cannot_read(lorakit: Callable, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for file in (trained / "adapter").iterdir():
        (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    done = lorakit("inspect", tmp_path / "a")
    assert done.code == 0
    assert "1 tensors hold NaN" in done.out and "not measured: everything" in done.out


def test_selftest_runs_every_check(lorakit: Callable) -> None:
    done = lorakit("selftest", "--json")
    found = json.loads(done.out)
    assert done.code == 0 and found["ok"] is True
    assert {f"T{i}" for i in range(1, 33)} <= {check["id"] for check in found["checks"]}
    assert all(check["ok"] for check in found["checks"])


def test_a_failing_check_is_exit_code_8(lorakit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(where: Where) -> Outcome:
        """T1: one and one."""
        return Outcome((2.0,), (3.0,))

    monkeypatch.setattr("lorakit.theory.selftest.CHECKS", (type(CHECKS[0])("T1", wrong), *CHECKS[1:4]))
    done = lorakit("selftest", "--only", "T1", "--only", "t2")
    assert done.code == 8
    assert "T1     FAILED" in done.out and "1 of 2 checks failed: T1" in done.err
    assert lorakit("selftest", "--only", "T2").code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "T99"], "no check T99"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--device", "cuda:99"], "no device 'cuda:99'"),
    ],
)
def test_selftest_refuses_what_is_not_there(lorakit: Callable, options: list[str], said: str) -> None:
    done = lorakit("selftest", *options)
    assert done.code == 2 and said in done.err
