"""A run that keeps its frozen prefix is the run, interrupted anywhere or not, alone or beside others."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.core.errors import LorakitError, ResourceError, UsageError
from lorakit.core.target import Target
from lorakit.models import prefix as prefix_module
from lorakit.models.blocks import FastBlock
from lorakit.train.config import RunConfig
from lorakit.train.config_file import loads
from lorakit.train.many import run_many
from lorakit.train.progress import Progress
from lorakit.train.run import run
from lorakit.train.stop import Interrupted
from lorakit.train.task import LanguageModelling

ROWS, BATCH, EPOCHS = 11, 4, 3
STEPS = 3  # of an epoch


class Silent(Progress):
    def __init__(self, label: str = "") -> None:
        super().__init__(0, live=False, label=label)

    def _write(self, text: str) -> None:
        pass


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the comparison to the bit needs; what sets another number puts this one back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def configure(still_model: Path, rows: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    data = rows(ROWS)

    def make(name: str, kept: bool = True, **changes: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "model.name": str(still_model),
            "model.dtype": "float32",
            "data.path": str(data),
            "method.r": 3,
            "method.last_n_layers": 1,
            "optim.lr": 1e-2,
            "train.batch_size": BATCH,
            "train.epochs": EPOCHS,
            "train.save_steps": 0,
            "train.cache_prefix": kept,
            "output": str(tmp_path / name),
        }
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        return loads("", [f"{k}={json.dumps(v)}" for k, v in settings.items() if v is not ...])[0]

    return make


def go(config: RunConfig) -> RunConfig:
    run(config, progress=Silent())
    return config


def records(config: RunConfig, *keys: str) -> list[Any]:
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in keys if key in line]


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "adapter" / "adapter_model.safetensors")


def same_bytes(one: RunConfig, two: RunConfig) -> None:
    keys = ("loss", "grad_norm", "eval_loss", "lr")
    assert records(one, *keys) == records(two, *keys) != []
    files = [(Path(c.output) / "adapter" / "adapter_model.safetensors").read_bytes() for c in (one, two)]
    assert files[0] == files[1]


def same_run(one: RunConfig, two: RunConfig, tolerance: float = 1e-5) -> None:
    assert records(one, "lr", "tokens") == records(two, "lr", "tokens")
    assert records(one, "loss", "eval_loss") == pytest.approx(records(two, "loss", "eval_loss"), rel=tolerance)
    expected = weights(two)
    for key, tensor in weights(one).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4)


def said(config: RunConfig) -> str:
    return (Path(config.output) / "log.txt").read_text()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lowest block only frozen": {"method__last_n_layers": 2},
    "accumulated": {"train__accumulate": 2},
    "by tokens": {"train__batch_size": ..., "train__batch_tokens": 90},
    "recomputed": {"train__checkpointing": True},
    "dropout in the adapters": {"method__dropout": 0.2},
    "bfloat16": {"model__dtype": "bfloat16"},
    "evaluated": {"data__valid": 0.2, "train__eval_steps": 2, "eval__prompts": ["3 plus 2?"], "eval__max_tokens": 3},
    "diagnosed": {"train__diagnose": True, "train__diagnose_steps": 2, "data__valid": 0.2},
    "budget": {"method__r": ..., "method__name": "adalora", "method__init_r": 4, "method__target_r": 2},
    "restarts": {"train__controller": {"name": "relora", "every": 2}, "optim__lr": 1e-3},
    "a start from data": {"method__init": "eva"},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_run_with_it_is_the_run_without(configure: Callable[..., RunConfig], case: str) -> None:
    """The first epoch to the last bit, the others but for rounding."""
    settings = SETTINGS[case]
    kept, without = (go(configure(name, name == "kept", **settings)) for name in ("kept", "without"))
    same_run(kept, without, 1e-2 if case == "bfloat16" else 1e-5)
    losses = [records(config, "loss") for config in (kept, without)]
    epoch = len([e for e in records(kept, "epoch") if e <= 1]) if case not in ("evaluated", "diagnosed") else 2
    assert epoch and losses[0][:epoch] == losses[1][:epoch] and len(losses[0]) > epoch
    assert losses[0] != [losses[0][0]] * len(losses[0])
    assert "frozen prefix: block" in said(kept) and "frozen prefix" not in said(without)
    assert {p.name for p in Path(kept.output).iterdir()} == {p.name for p in Path(without.output).iterdir()}


def test_nf4(configure: Callable[..., RunConfig]) -> None:
    pytest.importorskip("bitsandbytes")
    kept, without = (go(configure(n, n == "kept", model__quantize="nf4")) for n in ("kept", "without"))
    same_run(kept, without)
    assert records(kept, "loss")[:STEPS] == records(without, "loss")[:STEPS]


class StopAt:
    """A signal in the n-th micro-batch, as Ctrl-C in the middle of anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.count, real = 0, LanguageModelling.losses

        def losses(task: LanguageModelling, *args: Any) -> Any:
            self.count += 1
            if self.count == at:
                os.kill(os.getpid(), signal.SIGINT)
            return real(task, *args)

        monkeypatch.setattr(LanguageModelling, "losses", losses)


@pytest.mark.parametrize("settings", [{}, {"method__dropout": 0.2, "train__accumulate": 2}], ids=["plain", "dropout"])
def test_interrupted_in_any_epoch_it_goes_on_bit_for_bit(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    whole = go(configure("whole", **settings))
    for at in (1, 3, 5, 7):
        config = configure(f"stopped-{at}", **settings)
        StopAt(monkeypatch, at)
        with pytest.raises(Interrupted):
            go(config)
        monkeypatch.undo()
        same_bytes(go(config), whole)
        assert "resumed at step" in said(config)


def test_killed_without_warning_it_goes_on_bit_for_bit(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config = go(configure("whole", train__save_steps=2)), configure("killed", train__save_steps=2)

    class Killed(BaseException):
        pass

    real = LanguageModelling.losses
    for at in (2, 4, 3):  # in the first epoch, in the second, in the third
        count = 0

        def losses(task: LanguageModelling, *args: Any, at: int = at) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise Killed
            return real(task, *args)

        monkeypatch.setattr(LanguageModelling, "losses", losses)
        with pytest.raises(Killed):
            go(config)
        monkeypatch.undo()
    same_bytes(go(config), whole)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """Count how often (tokens, block) ran in training."""
    runs, real = Counter[tuple[int, int]](), FastBlock.fused

    def fused(block: FastBlock, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        runs[x.shape[1], block.self_attn.layer_idx] += 1
        return real(block, x, *args, **kwargs)

    monkeypatch.setattr(FastBlock, "fused", fused)
    return runs


@pytest.mark.parametrize("last", [1, 2])
def test_blocks_below_run_in_the_first_epoch_only(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    runs = counted(monkeypatch)
    go(configure("kept", method__last_n_layers=last))
    proof = 16  # tokens of the proof at the start
    each = Counter[int]()
    for (tokens, block), count in runs.items():
        each[block] += count if tokens != proof else 0
    below, above = range(3 - last), range(3 - last, 3)
    assert each == {**dict.fromkeys(below, STEPS), **dict.fromkeys(above, STEPS * EPOCHS)}


def test_after_an_interruption_they_run_for_what_is_needed_again(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("kept")
    StopAt(monkeypatch, STEPS)
    with pytest.raises(Interrupted):
        go(config)
    monkeypatch.undo()
    runs = counted(monkeypatch)
    go(config)
    assert sum(count for (tokens, block), count in runs.items() if block == 0 and tokens != 16) == STEPS
    assert sum(count for (tokens, block), count in runs.items() if block == 2 and tokens != 16) == STEPS * (EPOCHS - 1)


def test_threads_that_share_a_micro_batch(configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    settings = {"train__batch_size": 5, "train__accumulate": 2}
    kept, again, without = (go(configure(n, n != "without", **settings)) for n in ("kept", "again", "without"))
    assert "shared by up to 2 threads" in said(kept) and torch.get_num_threads() == 2
    same_bytes(kept, again)
    same_run(kept, without)
    first = len([e for e in records(kept, "epoch") if e <= 1])
    assert records(kept, "loss")[:first] == records(without, "loss")[:first]
    stopped = configure("stopped", **settings)
    for at in (3, 2):
        StopAt(monkeypatch, 2 * at)  # each micro-batch is two shares
        with pytest.raises(Interrupted):
            go(stopped)
        monkeypatch.undo()
    same_bytes(go(stopped), kept)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_run_in_the_passes_of_the_first_epoch(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """The same rows together, by as many threads: this is what makes their states the same whenever they are needed."""
    Pass = tuple[int, tuple[tuple[int, ...], ...]]
    passes, groups = list[Pass](), list[Pass]()
    real, states = LanguageModelling.losses, prefix_module._states

    def losses(task: LanguageModelling, model: Any, parts: Any) -> Any:
        if model.training:
            passes.append((torch.get_num_threads(), tuple(tuple(row.input_ids) for rows in parts for row in rows)))
        return real(task, model, parts)

    def grouped(model: Any, depth: int, rows: Any, by: int) -> torch.Tensor:
        groups.append((by, tuple(tuple(row) for row in rows)))
        return states(model, depth, rows, by)

    monkeypatch.setattr(LanguageModelling, "losses", losses)
    monkeypatch.setattr(prefix_module, "_states", grouped)
    torch.set_num_threads(threads)
    go(configure("kept", train__batch_size=5))
    first = len(groups)
    assert first == (5 if threads == 2 else 3), "5, 5 and 1 rows, those of 5 in a share for each thread"
    assert sorted(groups) == sorted(passes[:first])


# --- several runs at once ---

RUNS: dict[str, dict[str, Any]] = {
    "small": {"method__r": 2, "train__seed": 0, "method__dropout": 0.2},
    "large": {"method__r": 5, "train__seed": 1, "train__accumulate": 2},
    "brief": {"method__r": 3, "train__seed": 2, "train__epochs": 2},
}


def test_runs_at_once_have_one_prefix(configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"data__valid": 0.2, "train__eval_steps": 2}  # each holds out rows of its own
    alone = {name: configure(f"alone-{name}", False, **changes, **own) for name, own in RUNS.items()}
    many = {name: configure(f"many-{name}", **changes, **own) for name, own in RUNS.items()}
    states, real = list[int](), prefix_module._states
    monkeypatch.setattr(prefix_module, "_states", lambda m, d, rows, t: states.append(len(rows)) or real(m, d, rows, t))
    run_many(many, progress=Silent)
    assert sum(states) == ROWS, "each row once, for all runs together"
    for name, config in alone.items():
        same_run(many[name], go(config))
        assert "frozen prefix" in said(many[name])


def test_interrupted_all_of_them_go_on_bit_for_bit(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {name: own | {"train__accumulate": 1} for name, own in RUNS.items()}
    whole, parts = ({n: configure(f"{under}-{n}", **own) for n, own in runs.items()} for under in ("whole", "parts"))
    run_many(whole, progress=Silent)
    StopAt(monkeypatch, STEPS + 3)
    with pytest.raises(Interrupted):
        run_many(parts, progress=Silent)
    monkeypatch.undo()
    run_many(parts, progress=Silent)
    for name in runs:
        same_bytes(parts[name], whole[name])


def test_groups_of_runs_have_a_prefix_each(configure: Callable[..., RunConfig]) -> None:
    many = {name: configure(f"many-{name}", **own) for name, own in RUNS.items()}
    results = run_many(many, progress=Silent, at_once=2)
    assert all(not isinstance(result, LorakitError) for result in results.values())
    same_run(many["brief"], go(configure("alone", False, **RUNS["brief"])))


def test_runs_at_once_keep_it_all_or_none(configure: Callable[..., RunConfig]) -> None:
    with pytest.raises(UsageError, match=r"train\.cache_prefix"):
        run_many({"a": configure("a"), "b": configure("b", False)}, progress=Silent)


# --- refusals, and what is said ---


@pytest.mark.parametrize(
    "settings",
    [
        {"method__last_n_layers": None},
        {"method__modules_to_save": ["embed_tokens"]},
        {"model__name": "tiny"},
        {"model__name": "encoder"},
    ],
    ids=["all layers", "embeddings", "dropout", "classifier"],
)
def test_where_it_would_not_be_exact_it_is_refused_before_training(
    configure: Callable[..., RunConfig],
    tiny_model: Path,
    tiny_encoder: Path,
    rows: Callable[..., Path],
    settings: dict[str, Any],
) -> None:
    names = {"tiny": tiny_model, "encoder": tiny_encoder}
    if "model__name" in settings:
        settings = {"model__name": str(names[settings["model__name"]])}
    if settings.get("model__name") == str(tiny_encoder):
        settings |= {"data__path": str(rows(9, "labels.jsonl", label=True))}
    config = configure("run", **settings)
    with pytest.raises(UsageError, match=r"train\.cache_prefix") as refusal:
        go(config)
    assert refusal.value.why and "leave train.cache_prefix out" in str(refusal.value.fix)
    assert not (Path(config.output) / "adapter").exists()


def test_padded_rows_are_refused(configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.train.session.enable_packing", lambda model: False)
    with pytest.raises(UsageError, match=r"train\.cache_prefix") as refusal:
        go(configure("run"))
    assert "packed" in refusal.value.what


def test_a_full_disk_stops_the_run_which_then_goes_on(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config = go(configure("whole", train__save_steps=1)), configure("full", train__save_steps=1)
    real, writes = os.pwrite, 0

    def pwrite(file: int, part: Any, at: int) -> int:
        nonlocal writes
        if memoryview(part).nbytes > 1000:  # the lock of the directory is written too
            writes += 1
            if writes == 2:
                raise OSError(28, os.strerror(28))
        return real(file, part, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ResourceError, match="frozen prefix"):
        go(config)
    monkeypatch.undo()
    same_bytes(go(config), whole)


def test_it_is_not_switched_in_the_middle_of_a_run(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    StopAt(monkeypatch, 5)
    with pytest.raises(Interrupted):
        go(configure("run"))
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"train\.cache_prefix"):
        go(configure("run", False))


def test_a_run_that_could_keep_it_is_told_once(configure: Callable[..., RunConfig]) -> None:
    hint = "train.cache_prefix: true would run"
    assert said(go(configure("could", False))).count(hint) == 1
    assert hint not in said(go(configure("brief", False, train__epochs=1.5)))
    assert hint not in said(go(configure("all", False, method__last_n_layers=None)))
    assert hint not in said(go(configure("does")))


def test_from_python_the_model_is_as_it_was(still_model: Path, rows: Callable[..., Path], tmp_path: Path) -> None:
    from lorakit.models.load import load

    loaded = load(str(still_model), dtype="float32")
    common = {
        "data": rows(6),
        "epochs": 2,
        "lr": 0.01,
        "batch_size": 2,
        "target": Target(last_n_layers=1),
        "cache_prefix": True,
    }
    result = lk.train(loaded.model, loaded.tokenizer, output=tmp_path / "run", method=lk.LoRA(r=2), **common)
    assert result.steps == 6
    fresh = lk.load(load(str(still_model), dtype="float32").model, result.adapter)
    ids = torch.arange(12)[None]
    assert torch.equal(loaded.model.eval()(ids).logits, fresh.eval()(ids).logits)
