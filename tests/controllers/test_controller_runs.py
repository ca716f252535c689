"""Whole runs with a controller on a tiny model: the same bytes after any interruption, and one LoRA that PEFT loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.train import loop
from lorakit.train.config import RunConfig
from lorakit.train.config_file import loads
from lorakit.train.progress import Progress
from lorakit.train.run import RunResult, run

CONTROLLERS: dict[str, dict[str, Any]] = {
    "relora": {"name": "relora", "every": 3, "warmup": 1, "prune": "random", "share": 0.5},
    "plora": {"name": "plora", "stages": 3, "momentum": 0.5},
    "cola": {"name": "cola", "links": 3, "step_down": 0.5},
}
RANKS = {"relora": 12, "plora": 12, "cola": 7}  # of the saved adapter, with r = 4: three links, of cola 4 + 2 + 1


@pytest.fixture
def configure(tiny_model: Path, rows: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    """8 steps: with relora restarts after steps 3 and 6, with the others after steps 2 and 5."""
    data = rows(12)

    def make(name: str, **changes: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "model.name": str(tiny_model), "model.dtype": "float32", "data.path": str(data), "method.r": 4,
            "method.dropout": 0.1, "method.target_modules": ["q_proj", "down_proj"],
            "method.modules_to_save": ["lm_head"], "optim.lr": 1e-2, "optim.warmup": 1, "train.batch_size": 3,
            "train.max_steps": 8, "train.save_steps": 1, "train.keep_checkpoints": 20, "output": str(tmp_path / name),
        }  # fmt: skip
        settings |= {k.replace("__", "."): v for k, v in changes.items()}
        return loads("", [f"{k}={json.dumps(v)}" for k, v in settings.items()])[0]

    return make


class Silent(Progress):
    def __init__(self) -> None:
        super().__init__(0, live=False)

    def _write(self, text: str) -> None:
        pass


def go(config: RunConfig) -> RunResult:
    return run(config, progress=Silent())


def weights(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(directory: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss", r.get("eval_loss")), r.get("lr", 0.0)) for r in records]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", CONTROLLERS)
def test_killed_before_any_step_a_run_goes_on_bit_for_bit(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = {"train__controller": CONTROLLERS[name]}
    whole = go(configure("whole", **settings))
    config, real, resumed = configure("killed", **settings), loop.update, 0
    for at in (3, 4, 6, 7):  # around the restarts: the checkpoint of before has the other shapes or the new factors

        def update(job: loop.Job, state: loop.State, window: Any, at: int = at) -> Any:
            if state.step == at:
                raise Killed
            return real(job, state, window)

        monkeypatch.setattr(loop, "update", update)
        with pytest.raises(Killed):
            go(config)
        monkeypatch.undo()
        resumed += 1
    result = go(config)
    assert (result.resumed_from, resumed) == (7, 4)
    assert losses(result.directory) == losses(whole.directory)
    assert weights(result.directory) == weights(whole.directory)


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_saved_adapter_is_one_lora_that_peft_loads(
    configure: Callable[..., RunConfig], tiny_model: Path, name: str
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = configure("run", train__controller=CONTROLLERS[name])
    result = go(config)
    written = json.loads((result.adapter / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (RANKS[name], 2 * RANKS[name])
    x = torch.arange(12)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    plain = base(x).logits
    theirs = peft.PeftModel.from_pretrained(base, result.adapter).eval()
    ours = lk.load(AutoModelForCausalLM.from_pretrained(tiny_model), result.adapter).eval()
    assert torch.equal(theirs(x).logits, ours(x).logits)
    assert (ours(x).logits - plain).abs().max() > 1e-2


def test_one_link_is_the_run_without_a_controller(configure: Callable[..., RunConfig]) -> None:
    plain = go(configure("plain"))
    linked = go(configure("linked", train__controller={"name": "cola", "links": 1}))
    assert losses(plain.directory) == losses(linked.directory)
    assert weights(plain.directory) == weights(linked.directory)


def test_the_best_checkpoint_may_have_fewer_links(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    """After a late rate that destroys everything the adapter of an early step is taken back, with its ranks."""
    settings = {
        "data__valid": 0.25, "train__eval_steps": 1, "eval__load_best": True, "train__save_steps": 1,
        "train__controller": {"name": "plora", "stages": 4}, "optim__lr": 0.3, "optim__schedule": "constant",
        "optim__warmup": 0,
    }  # fmt: skip
    result = go(configure("run", **settings))
    evaluated = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    best = min((r for r in evaluated if "eval_loss" in r), key=lambda r: r["eval_loss"])["step"]
    assert best < 6, "this test needs a run whose best step comes before the last links"
    written = json.loads((result.adapter / "adapter_config.json").read_text())
    assert written["r"] == 4 * (1 + best // 2)


@pytest.mark.parametrize("optimizer", ["lora_fa", "riemannian", "lora_pro", "muon", "galore"])
def test_every_optimizer_in_a_run_that_is_cut_goes_on_bit_for_bit(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    settings: dict[str, Any] = {"optim__name": optimizer, "optim__lr": 1e-3}
    settings |= {"train__controller": {"name": "cola", "links": 2}, "train__max_steps": 6}
    if optimizer == "galore":
        settings["optim__options"] = {"rank": 2, "refresh": 2}
    whole, config, real = go(configure("whole", **settings)), configure("cut", **settings), loop.update

    def update(job: loop.Job, state: loop.State, window: Any) -> Any:
        if state.step == 5:
            raise Killed
        return real(job, state, window)

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(Killed):
        go(config)
    monkeypatch.undo()
    result = go(config)
    assert result.resumed_from == 5
    assert losses(result.directory) == losses(whole.directory)
    assert weights(result.directory) == weights(whole.directory)


def test_a_controller_that_cannot_work_with_the_method_is_refused_before_anything_is_loaded(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="relora cannot train the method dora: what it does to a weight is not adding"):
        configure("run", method__name="dora", train__controller="relora")
    assert not (tmp_path / "run").exists()
