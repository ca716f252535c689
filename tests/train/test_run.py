"""A whole run on a tiny model: it learns, resumes bit for bit from any interruption, and stops before doing harm."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.train import loop
from lorakit.train.config import RunConfig
from lorakit.train.config_file import loads
from lorakit.train.progress import Progress
from lorakit.train.run import RunResult, run
from lorakit.train.stop import Interrupted
from lorakit.train.task import LanguageModelling


class Silent(Progress):
    def __init__(self) -> None:
        super().__init__(0, live=False)
        self.messages: list[str] = []

    def _write(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def configure(tiny_model: Path, rows: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    def make(name: str = "run", **changes: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "model.name": tiny_model,
            "model.dtype": "float32",
            "data.path": tmp_path / "train.jsonl",
            "method.r": 4,
            "method.dropout": 0.1,
            "optim.lr": 3e-3,
            "train.batch_size": 3,
            "train.accumulate": 2,
            "train.epochs": 2,
            "train.save_steps": 2,
            "output": tmp_path / name,
        }
        if not (tmp_path / "train.jsonl").exists():
            rows()
        settings |= {k.replace("__", "."): v for k, v in changes.items()}
        overrides = [
            f"{k}={json.dumps(str(v) if isinstance(v, Path) else v)}" for k, v in settings.items() if v is not ...
        ]
        return loads("", overrides)[0]

    return make


def go(config: RunConfig, **kwargs: Any) -> RunResult:
    return run(config, progress=Silent(), **kwargs)


def losses(directory: Path) -> list[tuple[int, str, float]]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], key, r[key]) for r in records for key in ("loss", "grad_norm", "eval_loss", "lr") if key in r]


def adapter_bytes(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_learns_and_leaves_what_it_promises(configure: Callable[..., RunConfig]) -> None:
    config = configure(
        train__epochs=10,
        data__valid=0.2,
        optim__lr=3e-2,
        method__modules_to_save=["lm_head"],
        eval__prompts=["3 plus 2?"],
        eval__max_tokens=4,
    )
    result = go(config)
    values = [v for _, key, v in losses(result.directory) if key == "loss"]
    assert sum(values[-3:]) / 3 < 0.7 * values[0]
    names = {p.name for p in result.directory.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "samples.jsonl", "log.txt", "checkpoints", "adapter"} <= names
    record = json.loads((result.directory / "metrics.jsonl").read_text().splitlines()[0])
    wanted = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "tok_s", "mem_gb", "t"}
    assert wanted == record.keys()
    assert result.evaluation["eval_loss"] == pytest.approx(
        [v for _, k, v in losses(result.directory) if k == "eval_loss"][-1]
    )
    assert len(result.checks) >= 5
    assert not any("nan" in c for c in result.checks)


def test_the_same_configuration_twice_is_the_same_run(configure: Callable[..., RunConfig]) -> None:
    one, two = go(configure("one")), go(configure("two"))
    assert losses(one.directory) == losses(two.directory)
    assert adapter_bytes(one.directory) == adapter_bytes(two.directory)
    other = go(configure("three", train__seed=1))
    assert adapter_bytes(other.directory) != adapter_bytes(one.directory)


class StopAt:
    """Raise a signal in this process at the n-th loss (training or evaluation), as Ctrl-C in the middle of anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, number: int = signal.SIGINT) -> None:
        self.count, real = 0, LanguageModelling.loss

        def loss(task: LanguageModelling, *args: Any) -> Any:
            self.count += 1
            if self.count == at:
                os.kill(os.getpid(), number)
            return real(task, *args)

        monkeypatch.setattr(LanguageModelling, "loss", loss)


@pytest.mark.parametrize("batching", [{"train__batch_size": 3}, {"train__batch_size": ..., "train__batch_tokens": 90}])
def test_interrupted_anywhere_a_run_goes_on_bit_for_bit(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, batching: dict[str, Any]
) -> None:
    """8 micro-batches an epoch in steps of 2, evaluations in between: every micro-batch is a place to stop."""
    settings = {"data__valid": 0.2, "train__eval_steps": 3, "train__save_steps": 4, **batching}
    whole = go(configure("whole", **settings))
    counter = StopAt(monkeypatch, -1)
    go(configure("counted", **settings))
    monkeypatch.undo()
    stopped = set()
    for at in range(1, counter.count + 1, 3):
        config = configure(f"stopped-{at}", **settings)
        StopAt(monkeypatch, at, signal.SIGTERM if at % 2 else signal.SIGINT)
        try:
            go(config)
        except Interrupted as error:
            assert error.exit_code == 128 + (signal.SIGTERM if at % 2 else signal.SIGINT)
            stopped.add(at)
        monkeypatch.undo()
        if at in stopped:
            go(config)
        directory = Path(config.output)
        assert losses(directory) == losses(whole.directory), f"stopped at loss {at}"
        assert adapter_bytes(directory) == adapter_bytes(whole.directory), f"stopped at loss {at}"
    assert len(stopped) > 4


def test_killed_without_warning_a_run_goes_on_bit_for_bit(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(configure("whole"))
    config = configure("killed")

    class Killed(BaseException):
        pass

    for at in (1, 4, 6):  # again and again: in the first step, after a checkpoint, in the next one
        real, count = loop.update, 0

        def update(*args: Any, at: int = at, real: Any = real) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise Killed
            return real(*args)

        monkeypatch.setattr(loop, "update", update)
        with pytest.raises(Killed):
            go(config)
        monkeypatch.undo()
    result = go(config)
    assert result.resumed_from
    assert losses(result.directory) == losses(whole.directory)
    assert adapter_bytes(result.directory) == adapter_bytes(whole.directory)


@pytest.mark.parametrize("packed", [True, False])
def test_one_times_four_is_four_times_one(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    if not packed:
        monkeypatch.setattr("lorakit.train.session.enable_packing", lambda model: False)
    same = {"method__dropout": 0.0, "train__max_steps": 3, "train__epochs": ..., "optim__lr": 1e-3}
    monkeypatch.setattr(loop, "random_seed", lambda *_: 0)
    deterministic = dict(same)
    wide = go(configure("wide", train__batch_size=4, train__accumulate=1, **deterministic), **no_dropout(configure))
    deep = go(configure("deep", train__batch_size=1, train__accumulate=4, **deterministic), **no_dropout(configure))
    for (_, _, a), (_, _, b) in zip(losses(wide.directory), losses(deep.directory), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def no_dropout(configure: Callable[..., RunConfig]) -> dict[str, Any]:
    from lorakit.models.load import load

    loaded = load(configure().model.name, dtype="float32")
    for module in loaded.model.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.0
    return {"model": (loaded.model, loaded.tokenizer)}


def test_padded_and_packed_are_the_same_training(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    same = {"method__dropout": 0.0, "train__max_steps": 4, "train__epochs": ..., "optim__lr": 1e-3}
    packed = go(configure("packed", **same), **no_dropout(configure))
    monkeypatch.setattr("lorakit.train.session.enable_packing", lambda model: False)
    padded = go(configure("padded", **same), **no_dropout(configure))
    for (_, _, a), (_, _, b) in zip(losses(packed.directory), losses(padded.directory), strict=True):
        assert a == pytest.approx(b, rel=2e-5)


def test_checkpointing_changes_nothing_but_memory(configure: Callable[..., RunConfig]) -> None:
    plain, again = go(configure("plain")), go(configure("again", train__checkpointing=True))
    for (_, _, a), (_, _, b) in zip(losses(plain.directory), losses(again.directory), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_nan_stops_before_the_update(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    real, calls = LanguageModelling.loss, 0

    def loss(task: LanguageModelling, model: Any, examples: Any) -> Any:
        nonlocal calls
        calls += 1
        total, right = real(task, model, examples)
        if calls == 6:
            total = (
                total * float("nan")
                if poison == "loss"
                else total + (next(iter(lk.adapters(model)))[2].lora_B * 1e38 * 1e38).sum()
            )
        return total, right

    monkeypatch.setattr(LanguageModelling, "loss", loss)
    seen: list[bool] = []
    step = torch.optim.AdamW.step

    def watched(optimizer: Any, *args: Any) -> Any:
        seen.append(all(bool(p.grad.isfinite().all()) for g in optimizer.param_groups for p in g["params"]))
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    config = configure()
    with pytest.raises(lk.LorakitError, match=r"at step 3; nothing was updated") as raised:
        go(config)
    assert raised.value.exit_code == 6
    assert "train.jsonl:" in str(raised.value)
    assert seen == [True, True]
    assert not (Path(config.output) / "adapter").exists()
    monkeypatch.undo()
    result = go(config)  # the checkpoint from before is good
    assert adapter_bytes(result.directory) == adapter_bytes(go(configure("clean")).directory)


def test_a_hopeless_learning_rate_is_stopped(configure: Callable[..., RunConfig]) -> None:
    with pytest.raises(lk.LorakitError) as raised:
        go(configure(optim__lr=30.0, train__epochs=6, optim__warmup=0, method__modules_to_save=["lm_head"]))
    assert raised.value.exit_code == 6
    assert (Path(configure().output) / "checkpoints").is_dir()


def test_the_best_adapter_is_kept_and_patience_ends_the_run(configure: Callable[..., RunConfig]) -> None:
    config = configure(
        data__valid=0.3, train__epochs=40, train__eval_steps=2, optim__lr=3e-2, optim__schedule="constant",
        eval__patience=3, eval__load_best=True, train__save_steps=0,
    )  # fmt: skip
    result = go(config)
    evaluations = [(step, v) for step, key, v in losses(result.directory) if key == "eval_loss"]
    best = min(evaluations, key=lambda e: e[1])
    assert evaluations[-1][0] == result.steps < 40 * 6
    assert [e for e in evaluations if e[0] > best[0]] == evaluations[-3:]
    kept = load_file(result.directory / "checkpoints" / f"step-{best[0]:06d}" / "adapter.safetensors")
    saved = load_file(result.adapter / "adapter_model.safetensors")
    assert saved.keys() == {f"base_model.model.{key.replace('/', '.')}.weight" for key in kept}
    assert all(torch.equal(saved[f"base_model.model.{key.replace('/', '.')}.weight"], kept[key]) for key in kept)


def test_nothing_is_overwritten_in_silence(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = configure(train__max_steps=2, train__epochs=...)
    result = go(config)
    before = {p: p.stat().st_mtime_ns for p in result.directory.rglob("*")}
    with pytest.raises(lk.LorakitError, match="finished run") as raised:
        go(config)
    assert raised.value.exit_code == 2
    assert {p: p.stat().st_mtime_ns for p in result.directory.rglob("*")} == before
    go(config, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("42")
    with pytest.raises(lk.LorakitError, match=r"thesis\.txt"):
        go(configure("mine"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "42"


@pytest.mark.parametrize(
    "change", [{"method__r": 8}, {"optim__lr": 1e-3}, {"train__batch_size": 2}, {"method__target_modules": ["q_proj"]}]
)
def test_an_unfinished_run_is_not_resumed_with_another_configuration(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    StopAt(monkeypatch, 7)
    with pytest.raises(Interrupted):
        go(configure())
    monkeypatch.undo()
    with pytest.raises(lk.LorakitError, match=next(iter(change)).replace("__", r"\.")):
        go(configure(**change))


def test_an_unfinished_run_is_not_resumed_with_other_data(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, rows: Callable[..., Path]
) -> None:
    StopAt(monkeypatch, 7)
    config = configure(train__max_length=100)
    with pytest.raises(Interrupted):
        go(config)
    monkeypatch.undo()
    rows(24)
    with pytest.raises(lk.LorakitError, match="the data changed"):
        go(config)


def test_a_layer_that_is_never_run_is_found_at_the_first_step(configure: Callable[..., RunConfig]) -> None:
    from lorakit.models.load import load

    loaded = load(configure().model.name, dtype="float32")
    loaded.model.idle = torch.nn.Linear(4, 4)
    with pytest.raises(lk.LorakitError, match="take no part in the loss: idle"):
        go(configure(), model=(loaded.model, loaded.tokenizer))


def test_an_encoder_learns_to_classify(
    configure: Callable[..., RunConfig], tiny_encoder: Path, rows: Callable[..., Path]
) -> None:
    config = configure(model__name=tiny_encoder, data__path=rows(60, "labels.jsonl", label=True), data__valid=0.2,
                       train__epochs=20, optim__lr=1e-2, train__batch_size=8, train__accumulate=1)  # fmt: skip
    result = go(config)
    assert result.evaluation["eval_accuracy"] >= 0.8
    written = json.loads((result.adapter / "adapter_config.json").read_text())
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert json.loads((result.adapter / "lorakit.json").read_text())["labels"] == ["even", "odd"]


def test_train_from_python(tiny_model: Path, rows: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    result = lk.train(model, tokenizer, data=rows(), output=tmp_path / "run", method=lk.LoRA(r=2), lr=1e-2, max_steps=3)
    assert result.steps == 3
    assert lk.names(model) == ["default"]
    fresh = lk.load(AutoModelForCausalLM.from_pretrained(tiny_model), result.adapter)
    x = torch.arange(12)[None]
    model.eval(), fresh.eval()
    assert torch.equal(model(x).logits, fresh(x).logits)
    assert (tmp_path / "run" / "report.html").exists()
    with pytest.raises(lk.LorakitError, match="no setting 'learning_rat'"):
        lk.train(model, tokenizer, data=rows(), output=tmp_path / "other", learning_rat=1)
