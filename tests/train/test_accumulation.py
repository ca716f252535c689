"""Several micro-batches with an optimizer that sums their gradients itself (FLORA), through the loop that trains."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.data.dataset import Example
from lorakit.optim import OPTIMIZERS, Accumulating, parameter_groups, state_bytes
from lorakit.optim.flora import OTHER_SEED, down, projection, up
from lorakit.train import loop
from lorakit.train.config import OptimConfig
from lorakit.train.config_file import loads
from lorakit.train.diagnostics import Nothing
from lorakit.train.progress import Progress
from lorakit.train.run import RunResult, run
from lorakit.train.shares import Team
from lorakit.train.steps import Window
from lorakit.train.stop import Interrupted
from lorakit.train.task import LanguageModelling

OUT, IN, RANK, ROWS = 12, 16, 4, 9


class Squares:
    """Rows are numbers of rows of X; the loss of one is |X_i W'^T - Y_i|^2."""

    worst = float("inf")

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.X, self.Y = torch.randn(ROWS, IN).double(), torch.randn(ROWS, OUT).double()

    def weight(self, example: Example) -> int:
        return 1

    def loss(self, model: nn.Module, examples: list[Example]) -> tuple[Tensor, int]:
        rows = [cast(int, e.label) for e in examples]
        return (model(self.X[rows]) - self.Y[rows]).square().sum(), 0


def job(**options: Any) -> loop.Job:
    """A layer trained in full by FLORA without momentum, as far as one update goes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False)).double()
    lk.attach(model, lk.METHODS["full"]())
    settings = OptimConfig(name="flora", lr=1e-2, betas=(0.0, 0.999), options={"rank": RANK, "seed": 3, **options})
    around: Any = SimpleNamespace(
        model=model, adapter="default", task=Squares(), examples=[Example([], [], i, "") for i in range(ROWS)], clip=None, seed=0,
        optimizer=OPTIMIZERS["flora"](parameter_groups(model, "default", settings), settings), stop=None,
        controller=SimpleNamespace(penalty=lambda: None, after_update=lambda *_: None), directory=Path("nowhere"), diagnostics=Nothing(),
        team=Team(),
    )  # fmt: skip
    around.parameters = [p for group in around.optimizer.param_groups for p in group["params"]]
    return around


WINDOW = Window(1.0, [[0, 1, 2], [3, 4, 5], [6, 7, 8]], False)


def parameter(around: loop.Job) -> nn.Parameter:
    return around.optimizer.param_groups[0]["params"][0]


def test_three_micro_batches_are_adafactor_on_the_projected_mean() -> None:
    """transformers' Adafactor on P^T P mean(g), P another one in each step."""
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    around = job()
    change = parameter(around)
    theirs = nn.Parameter(change.detach().clone())
    reference = adafactor([theirs], lr=1e-2, relative_step=False)
    W, task = around.model[0].weight.detach(), around.task
    for step in range(3):
        G = 2 * (task.X @ (W + theirs.detach()).T - task.Y).T @ task.X / ROWS
        P = projection(3 ^ OTHER_SEED, 0, step, (OUT, IN), RANK, G)
        theirs.grad = up(P, down(P, G), G.shape)
        assert (theirs.grad - G).norm() > 0.5 * G.norm(), "the compression must be seen"
        loop.alone(loop.update(around, loop.State(step=step), WINDOW))
        reference.step()
        error = (change.detach() - theirs.detach()).norm() / theirs.detach().norm()
        assert error < 1.5e-8


def test_one_micro_batch_or_compress_off_is_the_gradient_itself() -> None:
    alone, off, once = job(), job(compress=False), job(compress=False)
    assert isinstance(alone.optimizer, Accumulating) and not isinstance(off.optimizer, Accumulating)
    loop.alone(loop.update(alone, loop.State(), Window(1.0, [list(range(ROWS))], False)))
    loop.alone(loop.update(off, loop.State(), WINDOW))
    loop.alone(loop.update(once, loop.State(), Window(1.0, [list(range(ROWS))], False)))
    assert torch.equal(parameter(alone), parameter(once))
    torch.testing.assert_close(parameter(off), parameter(once), rtol=1e-12, atol=1e-12)


def test_between_micro_batches_only_the_compressed_sum_is_kept() -> None:
    around = job()
    optimizer = around.optimizer
    assert isinstance(optimizer, Accumulating)
    change, kept = parameter(around), []
    for batch in WINDOW.batches:
        around.task.loss(around.model, [around.examples[i] for i in batch])[0].backward()
        optimizer.take()
        assert change.grad is None
        kept.append(sum(t.numel() for t in optimizer.accumulation.sums.values()))
    assert kept == [RANK * IN] * 3
    assert state_bytes(optimizer) == 0, "it belongs to the step under way, not to a checkpoint"
    optimizer.zero_grad()
    optimizer.give()
    assert change.grad is None, "a dropped step leaves nothing behind"


def test_no_other_optimizer_is_asked() -> None:
    model = lk.attach(nn.Sequential(nn.Linear(4, 4)), lk.LoRA(r=2))
    settings = OptimConfig()
    assert not isinstance(OPTIMIZERS["adamw"](parameter_groups(model, "default", settings), settings), Accumulating)


class Silent(Progress):
    def __init__(self) -> None:
        super().__init__(0, live=False)

    def _write(self, text: str) -> None:
        pass


def test_interrupted_between_micro_batches_a_run_goes_on_bit_for_bit(
    tiny_model: Path, rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows(18)

    def go(name: str) -> RunResult:
        settings = {
            "model.name": str(tiny_model), "model.dtype": "float32", "data.path": str(data), "method.name": "full",
            "method.target_modules": ["q_proj", "down_proj"], "optim.name": "flora", "optim.lr": 1e-2,
            "optim.options": {"rank": 4, "refresh": 2}, "train.batch_size": 2, "train.accumulate": 3,
            "train.max_steps": 5, "train.save_steps": 2, "output": str(tmp_path / name),
        }  # fmt: skip
        return run(loads("", [f"{k}={json.dumps(v)}" for k, v in settings.items()])[0], progress=Silent())

    whole, real, calls = go("whole"), LanguageModelling.loss, 0

    def loss(task: LanguageModelling, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 11:  # the second of the three micro-batches of step 4
            os.kill(os.getpid(), signal.SIGINT)
        return real(task, *args)

    monkeypatch.setattr(LanguageModelling, "loss", loss)
    with pytest.raises(Interrupted):
        go("cut")
    monkeypatch.undo()
    resumed = go("cut")
    assert resumed.resumed_from == 3
    one, two = ((r.adapter / "adapter_model.safetensors").read_bytes() for r in (whole, resumed))
    assert one == two
