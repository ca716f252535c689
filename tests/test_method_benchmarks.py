"""The benchmarks of the methods run on every file there is, their closed forms are right, and their pages are the results'."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.optim import OPTIMIZERS
from lorakit.train.controllers import CONTROLLERS

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


def test_every_file_is_an_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, real = benchmark("methods_toy", monkeypatch), benchmark("methods_smollm2", monkeypatch)
    files = {"method": lk.METHODS, "init": lk.INITS, "optimizer": OPTIMIZERS, "controller": CONTROLLERS}
    wanted = {f"{kind}/{name}" for kind, registry in files.items() for name in registry}
    assert {f"{arm.kind}/{toy.file_of(arm.name)}" for arm in toy.arms()} >= wanted
    assert {arm.name for arm in real.arms()} == wanted
    assert real.RATES.keys() <= wanted


def test_the_toy_runs_with_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = benchmark("methods_toy", monkeypatch)
    monkeypatch.setattr(toy, "sweep", lambda arm, steps: {1e-2: 0.0})
    arms = [toy.measure(arm, 16, [1]) for arm in toy.arms()]
    refused = [arm["name"] for arm in arms if "refused" in arm]
    assert set(refused) <= {"paged_adamw", "loftq"}, "there is no GPU, or no bitsandbytes"
    for arm in arms:
        if "refused" not in arm and arm["optimum"] is not None and arm["name"] != "relora":
            assert arm["optimum"] <= arm["error"] + 1e-5, arm["name"]
    toy.write({"environment": ENVIRONMENT, "steps": 16, "seeds": [1], "arms": arms}, tmp_path, tmp_path)
    assert json.loads((tmp_path / "methods_toy.json").read_text())["arms"] == json.loads(json.dumps(arms))
    assert all(f"| {arm['name']} " in (tmp_path / "toy.md").read_text() for arm in arms)


ENVIRONMENT: dict[str, Any] = {
    "date": "2026-01-01",
    "gpu": None,
    "processor": "a processor",
    "processors_visible": 2,
    "threads": 1,
    "load_average": 0.0,
    "python": "3.11",
    "versions": {"torch": "2.13"},
    "commit": "none",
}


@pytest.mark.parametrize("name", ["LoRA of rank 4", "lora_fa", "oft", "pissa", "cola", "LoRA, kaiming"])
def test_the_optimum_is_reached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each closed form against a training run that has time to come to it: product, affine, rotation, offset, chain, covariance."""
    toy, one = benchmark("methods_toy", monkeypatch), benchmark("_toy", monkeypatch)
    (arm, *_) = [arm for arm in toy.arms() if arm.name == name]
    outcome = one.train(one.sized(arm, toy.SIZES, toy.OWN), 3e-2, 5, 400)
    assert outcome.optimum is not None
    assert outcome.error == pytest.approx(outcome.optimum, rel=1e-3, abs=1e-3)


def test_lora_of_rank_4_leaves_what_eckart_and_young_say(monkeypatch: pytest.MonkeyPatch) -> None:
    one = benchmark("_toy", monkeypatch)
    outcome = one.train(one.Arm("method", "lora", options={"r": 4}), 1e-2, 0, 300)
    assert outcome.optimum == pytest.approx(0.3**2 * 1 + 0.4**2 + 0.2**2 + 0.1**2, rel=1e-5)
    assert outcome.error == pytest.approx(0.3, rel=1e-4)
    assert (outcome.ranks, outcome.trainable) == ([4], 256)


def test_the_inputs_have_the_moments_that_the_closed_forms_take(monkeypatch: pytest.MonkeyPatch) -> None:
    one = benchmark("_toy", monkeypatch)
    for isotropic in (True, False):
        problem = one.Problem(one.Arm("method", "lora", isotropic=isotropic), 0)
        for x in (problem.x, problem.fresh):
            rows = x.reshape(-1, one.SIDE).double()
            root = problem.root.double()
            torch.testing.assert_close(rows.T @ rows / len(rows), root @ root, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rows.mean(0), torch.zeros(one.SIDE).double(), rtol=0, atol=1e-6)


def test_the_pages_are_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, picture = benchmark("methods_toy", monkeypatch), benchmark("_toy_plot", monkeypatch)
    content = json.loads((BENCHMARKS / "results" / "methods_toy.json").read_text())
    assert (ROOT / "docs" / "methods" / "toy.md").read_text() == toy.report(content)
    assert (ROOT / "docs" / "methods" / "toy.svg").read_text() == picture.plot(content["arms"])


@pytest.mark.parametrize("method", ["lora", "houlsby", "xlora"])
def test_the_real_one_on_a_tiny_model(
    method: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.data import orders_task

    script, parts = benchmark("methods_smollm2", monkeypatch), benchmark("_smollm2", monkeypatch)
    settings = {**script.SETTINGS, "steps": 5, "last_n_layers": 2, "again": 2, "written": 2, "max_tokens": 5}
    orders_task.write(tmp_path / "data", 0, 40, 4)
    monkeypatch.setitem(script.TARGETS, "houlsby", ["o_proj"])
    arm = script.Arm(f"method/{method}", method=method).job(1e-2)
    job = {"model": str(tiny_model), "dtype": "float32", "seed": 0, "threads": 1, "settings": settings, "rate": 1e-2}
    job = json.loads(json.dumps({**job, "data": str(tmp_path / "data"), "arm": arm}))
    trained = parts.train(job, tmp_path)
    assert "refused" not in trained, trained
    checked = parts.check(job, tmp_path)
    assert trained["losses"][-1] < trained["losses"][0]
    assert checked["after"]["loss"] < checked["before"]["loss"]
    assert checked["after"]["loss"] == pytest.approx(trained["eval_loss"], rel=1e-4), "in memory and from the file"
    assert checked["answers"] == trained["answers"]
    assert checked["resumed_is_the_same"]
    result = {"arm": arm, "train": trained, "check": checked}
    assert parts.verdict(result, 1e9, 0) == []
    assert parts.verdict(result, 0.0, 0)[0].startswith("not learned")
    content = {**job, "arms": {arm["name"]: result}, "environment": ENVIRONMENT}
    assert f"| {method} " in script.report(content)
    assert ("not merged: " in script.report(content)) == (method != "lora")


def test_forced_answers_are_greedy_answers(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teach a tiny model one row by heart: then the count says 1, and generation writes it."""
    from lorakit.models import generate, load

    parts = benchmark("_smollm2", monkeypatch)
    rows = [
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": a}]} for a in ("cd", "ef")
    ]
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load(str(tiny_model), dtype="float32")
    from lorakit.api import train

    train(
        loaded.model, loaded.tokenizer, data=tmp_path / "train.jsonl", output=tmp_path / "run",
        lr=5e-3, max_steps=150, save_steps=0, schedule="constant",
    )  # fmt: skip
    loaded.model.eval()
    assert generate(loaded.model, loaded.tokenizer, ["ab"], max_tokens=8) == ["cd"]
    assert {
        k: v for k, v in parts.forced(loaded.model, loaded.tokenizer, tmp_path / "valid.jsonl").items() if k != "loss"
    } == {
        "right": 1,
        "of": 2,
    }


def test_results_of_other_settings_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = benchmark("methods_smollm2", monkeypatch)
    (tmp_path / "x.json").write_text(json.dumps({"model": "smollm2", "arms": {}}))
    assert script.begun(tmp_path / "x.json", {"model": "smollm2"})["arms"] == {}
    with pytest.raises(SystemExit, match="another model"):
        script.begun(tmp_path / "x.json", {"model": "minilm"})
