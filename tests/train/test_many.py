"""Several runs at once on one base are the runs they would be alone: losses, checkpoints, adapters, however they end."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.train import many
from lorakit.train.config import RunConfig
from lorakit.train.config_file import loads
from lorakit.train.many import run_many
from lorakit.train.progress import Progress
from lorakit.train.run import run
from lorakit.train.session import RunResult
from lorakit.train.stop import Interrupted
from lorakit.train.task import LanguageModelling

RUNS: dict[str, dict[str, Any]] = {
    "small": {"method.r": 2, "optim.lr": 1e-3, "train.seed": 0, "method.dropout": 0.2},
    "large": {"method.r": 5, "optim.lr": 4e-3, "train.seed": 1, "train.accumulate": 2, "optim.b_ratio": 4.0},
    "other": {"method.r": 3, "method.alpha": 3, "optim.lr": 2e-3, "train.seed": 2, "optim.weight_decay": 0.1},
}


class Silent(Progress):
    def __init__(self, label: str = "") -> None:
        super().__init__(0, live=False, label=label)

    def _write(self, text: str) -> None:
        pass


@pytest.fixture
def configure(still_model: Path, rows: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, RunConfig]]:
    data = rows(11)

    def make(under: str, runs: dict[str, dict[str, Any]] | None = None, **changes: Any) -> dict[str, RunConfig]:
        base: dict[str, Any] = {
            "model.name": str(still_model),
            "model.dtype": "float32",
            "data.path": str(data),
            "train.batch_size": 2,
            "train.epochs": 1,
            "train.save_steps": 3,
        }
        base |= {key.replace("__", "."): value for key, value in changes.items()}
        configs = {}
        for name, own in (runs or RUNS).items():
            settings = base | own | {"output": str(tmp_path / under / name)}
            configs[name] = loads("", [f"{k}={json.dumps(v)}" for k, v in settings.items() if v is not ...])[0]
        return configs

    return make


def together(configs: dict[str, RunConfig], **settings: Any) -> Any:
    return run_many(configs, progress=Silent, **settings)


def records(config: RunConfig, *keys: str) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], key, r[key]) for r in lines for key in keys if key in r]


def same_run(one: RunConfig, two: RunConfig, tolerance: float = 1e-5) -> None:
    """Exactly the same steps, rates and tokens; the same losses, norms and adapters but for rounding."""
    exact = ("lr", "epoch", "tokens", "trained_tokens")
    assert records(one, *exact) == records(two, *exact)
    for a, b in zip(*(records(c, "loss", "grad_norm", "eval_loss") for c in (one, two)), strict=True):
        assert a[:2] == b[:2]
        assert a[2] == pytest.approx(b[2], rel=tolerance)
    files = [load_file(Path(c.output) / "adapter" / "adapter_model.safetensors") for c in (one, two)]
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        torch.testing.assert_close(tensor, files[1][key], rtol=tolerance, atol=tolerance)


def same_bytes(one: RunConfig, two: RunConfig) -> None:
    assert records(one, "loss", "grad_norm", "lr", "eval_loss") == records(two, "loss", "grad_norm", "lr", "eval_loss")
    files = [(Path(c.output) / "adapter" / "adapter_model.safetensors").read_bytes() for c in (one, two)]
    assert files[0] == files[1]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "ordinary"])
def test_three_runs_at_once_are_the_three_runs(
    configure: Callable[..., dict[str, RunConfig]], monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    """Ranks, scales, rates, seeds, decay, dropout and accumulation differ, and so do the numbers of steps."""
    if not fused:
        from lorakit.models.fast import ORDINARY

        monkeypatch.setattr("lorakit.train.session.accelerate", lambda model, known: ORDINARY)
    changes = {"data__valid": 0.2, "train__eval_steps": 2, "eval__prompts": ["3 plus 2?"], "eval__max_tokens": 3}
    alone, many, apart = (configure(name, **changes) for name in ("alone", "many", "apart"))
    results = together(many)
    together(apart, pass_tokens=1)  # each micro-batch in a pass of its own
    for name, config in alone.items():
        run(config, progress=Silent())
        same_run(config, many[name])
        same_run(config, apart[name])
        assert isinstance(results[name], RunResult)
        assert results[name].steps == len(records(many[name], "loss"))
    finished = {r.steps for r in results.values()}
    assert len(finished) > 1, "a run that ends first must not end the others"
    losses = [tuple(value for *_, value in records(c, "loss")) for c in many.values()]
    assert len(set(losses)) == 3, "the runs must differ"


def test_a_run_of_a_sweep_can_go_on_alone(configure: Callable[..., dict[str, RunConfig]]) -> None:
    """Its checkpoints do not know what its adapter was called on the model."""
    whole, parts = configure("whole"), configure("parts")
    together(whole)
    with stopped_at(2), pytest.raises(Interrupted):
        together(parts)
    resumed = {name: run(config, progress=Silent()).resumed_from for name, config in parts.items()}
    assert resumed == {"small": 3, "large": 1, "other": 3}, (
        "the third pass was the second half of a step of one of them"
    )
    for name, config in parts.items():
        same_run(config, whole[name])


class stopped_at:
    """Ctrl-C at the n-th pass of several runs."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __enter__(self) -> None:
        self.patch, count, real = pytest.MonkeyPatch(), 0, LanguageModelling.losses

        def losses(task: LanguageModelling, model: Any, groups: Any) -> Any:
            nonlocal count
            count += len(groups) > 1
            if count == self.at + 1 and len(groups) > 1:
                os.kill(os.getpid(), signal.SIGINT)
            return real(task, model, groups)

        self.patch.setattr(LanguageModelling, "losses", losses)

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


@pytest.mark.parametrize(("at", "even"), [(0, False), (2, True)])
def test_interrupted_all_runs_go_on(configure: Callable[..., dict[str, RunConfig]], at: int, even: bool) -> None:
    """Bit for bit where the runs are in step; where one is in the middle of a step, others come to share its passes."""
    runs = {name: own | {"train.accumulate": 1} for name, own in RUNS.items()} if even else RUNS
    whole, parts = configure("whole", runs), configure("parts", runs)
    together(whole)
    with stopped_at(at), pytest.raises(Interrupted) as stopped:
        together(parts)
    assert stopped.value.exit_code == 130
    assert not any((Path(config.output) / "adapter").exists() for config in parts.values())
    results = together(parts)
    for name in parts:
        (same_bytes if even else same_run)(parts[name], whole[name])
        assert results[name].resumed_from is not None


def test_a_run_that_diverges_ends_alone(
    configure: Callable[..., dict[str, RunConfig]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are no longer finite from the third pass on; the other run does not see them."""
    runs = {"good": RUNS["small"], "bad": RUNS["other"]}
    alone, many = configure("alone", {"good": RUNS["small"]})["good"], configure("many", runs)
    real, passes = LanguageModelling.losses, 0

    def losses(task: LanguageModelling, model: Any, groups: Any) -> Any:
        nonlocal passes
        passes += 1
        if len(groups) == 2 and passes > 3:
            with torch.no_grad():
                for _, _, adapter in lk.adapters(model, "bad"):
                    adapter.lora_B.fill_(float("nan"))
        return real(task, model, groups)

    run(alone, progress=Silent())
    monkeypatch.setattr(LanguageModelling, "losses", losses)
    results = together(many)
    same_run(alone, many["good"])
    assert isinstance(results["bad"], lk.LorakitError)
    assert results["bad"].exit_code == 6
    assert not (Path(many["bad"].output) / "adapter").exists()


def test_early_stopping_is_each_runs_own(configure: Callable[..., dict[str, RunConfig]]) -> None:
    changes = {
        "data__valid": 0.2,
        "train__eval_steps": 1,
        "train__epochs": 3,
        "eval__patience": 1,
        "eval__load_best": True,
    }
    runs = {"wild": RUNS["small"] | {"optim.lr": 0.3}, "calm": RUNS["other"]}
    alone, many = configure("alone", runs, **changes), configure("many", runs, **changes)
    results = together(many)
    for name in runs:
        run(alone[name], progress=Silent())
        same_run(alone[name], many[name], 1e-3)  # at a rate of 0.3 rounding grows
    assert results["wild"].steps < results["calm"].steps


def test_methods_and_controllers_are_each_runs_own(configure: Callable[..., dict[str, RunConfig]]) -> None:
    """Budgets that prune, restarts that replace the factors, and starts from the weights, beside each other."""
    runs: dict[str, dict[str, Any]] = {
        "budget": {"method.name": "adalora", "method.init_r": 4, "method.target_r": 2},
        "restarts": {"method.r": 2, "train.controller": {"name": "relora", "every": 2}},
        "spectral": {"method.r": 2, "method.init": "pissa", "optim.name": "muon"},
        "frozen-A": {"method.name": "lora_fa", "method.r": 3},
    }
    changes = {"train__max_steps": 6, "train__epochs": ..., "optim__lr": 1e-3}
    alone, many = configure("alone", runs, **changes), configure("many", runs, **changes)
    together(many)
    for name, config in alone.items():
        run(config, progress=Silent())
        same_run(config, many[name], 1e-4 if name == "spectral" else 1e-5)


def test_finished_runs_are_left_alone_and_runs_come_in_groups(configure: Callable[..., dict[str, RunConfig]]) -> None:
    configs = configure("many", train__max_steps=2, train__epochs=...)
    first = together({"small": configs["small"]})
    before = {p: p.stat().st_mtime_ns for p in Path(configs["small"].output).rglob("*")}
    results = together(configs, at_once=1)
    assert (list(first), list(results)) == (["small"], ["large", "other"])
    assert {p: p.stat().st_mtime_ns for p in Path(configs["small"].output).rglob("*")} == before
    with pytest.raises(lk.LorakitError, match="all 3 runs are finished"):
        together(configs)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "targets": ({"method.target_modules": ["q_proj"]}, {}, "method.target_modules"),
    "data": ({"data.skip_bad_rows": True}, {}, "data.skip_bad_rows"),
    "a module in full": ({}, {"method.modules_to_save": ["lm_head"]}, "in full"),
    "no low rank": ({}, {"method.name": "dora"}, "DoRA"),
    "dropout and recomputation": ({}, {"train.checkpointing": True, "method.dropout": 0.1}, "dropout"),
    "two in one directory": ({"output": "same"}, {"output": "same"}, "same output"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_share_a_pass_is_refused(
    configure: Callable[..., dict[str, RunConfig]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    other, both, match = REFUSED[case]
    configs = configure("many", {"one": both, "two": both | other})
    if case.startswith("two"):
        configs = {name: loads("", ["model=m", "data=d", "output=same"])[0] for name in configs}
    with pytest.raises(lk.LorakitError, match=match) as refusal:
        together(configs)
    assert refusal.value.exit_code == 2
    assert refusal.value.fix


def test_a_base_with_dropout_of_its_own_is_refused(
    configure: Callable[..., dict[str, RunConfig]], tiny_model: Path
) -> None:
    with pytest.raises(lk.LorakitError, match="cannot train together") as refusal:
        together(configure("many", model__name=str(tiny_model)))
    assert "attention_dropout" in str(refusal.value)


def test_from_python_the_adapters_stay_on_the_model_for_a_bank(
    still_model: Path, rows: Callable[..., Path], tmp_path: Path
) -> None:
    from lorakit.models.generate import generate
    from lorakit.models.load import load

    loaded = load(str(still_model), dtype="float32")
    runs = {"a": {"method": lk.LoRA(r=2), "lr": 0.05}, "b": {"seed": 3}}
    common = {"data": rows(6), "output": tmp_path / "runs", "max_steps": 3, "lr": 0.02, "batch_size": 2}
    results = lk.train_many(loaded.model, loaded.tokenizer, runs=runs, **common)
    assert [r.adapter for r in results.values()] == [tmp_path / "runs" / name / "adapter" for name in "ab"]
    assert (lk.names(loaded.model), lk.active(loaded.model)) == (["a", "b"], None)
    prompts = ["3 plus 2?"] * 3
    expected = [
        generate(lk.use(loaded.model, n), loaded.tokenizer, prompts[:1], max_tokens=4)[0] for n in ("b", None, "a")
    ]
    lk.bank(loaded.model, list(results))
    assert generate(loaded.model, loaded.tokenizer, prompts, max_tokens=4, adapters=["b", None, "a"]) == expected
    lk.detach(loaded.model)
    with pytest.raises(lk.LorakitError, match="all 2 runs are finished"):
        lk.train_many(loaded.model, loaded.tokenizer, runs=runs, **common)


def test_the_command_trains_a_grid_and_lists_the_best_first(
    still_model: Path, rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.cli.main import run as command

    flags = ["--model", still_model, "--data", rows(6), "-o", tmp_path / "out", "--dtype", "float32", "--max-steps", 2]
    axes = ["lr=[1e-3,0.01]", "--method.r", "[2,3]", "betas=[0.9,0.99]"]
    assert command(["sweep", "-q", "--json", *map(str, flags), *axes]) == 0
    found = json.loads(capsys.readouterr().out)
    labels = [f"lr={lr},r={r}" for lr in ("0.001", "0.01") for r in (2, 3)]
    assert sorted(run["run"] for run in found) == labels
    assert [run["loss"] for run in found] == sorted(run["loss"] for run in found)
    for label in labels:
        config = loads((tmp_path / "out" / label / "config.yaml").read_text())[0]
        assert f"lr={config.optim.lr:g},r={vars(config.method.config)['r']}" == label
        assert config.optim.betas == (0.9, 0.99)
        assert (tmp_path / "out" / label / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "report.html").exists()
    assert command(["sweep", "-q", *map(str, flags), "lr=1e-3"]) == 2
    assert "nothing to sweep" in capsys.readouterr().err
    assert command(["sweep", "-q", *map(str, flags), *axes]) == 2
    assert "all 4 runs are finished" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing has to outlive a crash."""
    from lorakit.core import files

    monkeypatch.setattr(files, "sync", lambda path: None, raising=False)
    yield


def test_a_pass_has_as_many_micro_batches_as_fit_and_never_none() -> None:
    def micro(tokens: int) -> Any:
        return SimpleNamespace(rows=[SimpleNamespace(input_ids=[0] * tokens)])

    lengths = {"a": 200, "b": 300, "c": 20, "d": 900, "e": 10, "f": 502, "g": 1}
    passes = many._passes({name: micro(n) for name, n in lengths.items()}, 512)
    assert [list(one) for one in passes] == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"]]
    assert many._passes({}, 512) == []
