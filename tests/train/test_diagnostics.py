"""A run that looks at itself is the same run; what it sees is what a formula or another way to the same number gives."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core.attach import adapters
from lorakit.data.dataset import Example
from lorakit.kernels.low_rank import plain
from lorakit.optim.groups import parameter_groups
from lorakit.theory import coding, gain
from lorakit.theory.alarms import Alarms, rules
from lorakit.train import loop
from lorakit.train.config import OptimConfig, RunConfig
from lorakit.train.config_file import loads
from lorakit.train.diagnostics import FIELDS, Watching
from lorakit.train.progress import Progress
from lorakit.train.run import RunResult, run


class Silent(Progress):
    def __init__(self) -> None:
        super().__init__(0, live=False)
        self.messages: list[str] = []

    def _write(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def configure(tiny_model: Path, rows: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    rows()

    def make(name: str = "run", **changes: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "model.name": str(tiny_model),
            "model.dtype": "float32",
            "data.path": str(tmp_path / "train.jsonl"),
            "data.valid": 0.2,
            "method.r": 4,
            "optim.lr": 3e-3,
            "train.batch_size": 3,
            "train.accumulate": 2,
            "train.epochs": 1,
            "train.save_steps": 2,
            "train.diagnose": True,
            "train.diagnose_steps": 2,
            "output": str(tmp_path / name),
        }
        settings |= {k.replace("__", "."): v for k, v in changes.items()}
        return loads("", [f"{k}={json.dumps(v)}" for k, v in settings.items() if v is not ...])[0]

    return make


def go(config: RunConfig) -> tuple[RunResult, list[dict[str, Any]], list[str]]:
    progress = Silent()
    result = run(config, progress=progress)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines], progress.messages


def course(records: list[dict[str, Any]]) -> list[tuple[int, Any, Any, Any]]:
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("eval_loss")) for r in records]


def tensors(result: RunResult) -> bytes:
    return (result.adapter / "adapter_model.safetensors").read_bytes()


METHODS: list[dict[str, Any]] = [
    {"method__name": "lora", "method__dropout": 0.2},
    {"method__name": "lora", "method__dropout": 0.1, "method__init": "pissa", "optim__weight_decay": 0.1},
    {"method__name": "adalora", "method__r": ..., "method__init_r": 6, "method__target_r": 3},
    {"method__name": "molora", "method__num_experts": 3, "method__top_k": 2, "method__dropout": 0.1},
    {"method__name": "dora", "method__dropout": 0.1},
    {
        "method__name": "full",
        "method__r": ...,
        "optim__name": "flora",
        "optim__options": {"rank": 4},
        "train__batch_size": 2,
    },
    {"method__name": "lora", "train__controller": {"name": "relora", "every": 2}},
]


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(str(v) for v in s.values() if isinstance(v, str)))
def test_a_watched_run_is_the_same_run(configure: Callable[..., RunConfig], settings: dict[str, Any]) -> None:
    watched, seen, _ = go(configure("watched", **settings))
    plain, unseen, _ = go(configure("plain", **settings, train__diagnose=False))
    assert course(seen) == course(unseen)
    assert tensors(watched) == tensors(plain)
    assert any("gain_ratio" in r for r in seen)
    assert not any(FIELDS.keys() & r.keys() for r in unseen)


def test_a_watched_run_that_was_stopped_has_seen_the_same(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in a look and between looks: the start of A, the sums and the alarms come back from the checkpoint."""
    settings = {
        "method__dropout": 0.1,
        "train__eval_steps": 3,
        "optim__weight_decay": 0.1,
        "optim__lr": 0.3,
        "train__epochs": 2,
    }
    whole, all_of_it, said = go(configure("whole", **settings))
    assert any("diagnose" in text for text in said)  # so that there are alarms to go on with

    class Killed(BaseException):
        pass

    config, real = configure("killed", **settings), loop.check_finite
    for at in (2, 3, 4):
        calls = iter(range(1, 100))

        def check(*args: Any, at: int = at, calls: Any = calls) -> Any:
            if next(calls) == at:
                raise Killed
            return real(*args)

        monkeypatch.setattr(loop, "check_finite", check)
        with pytest.raises(Killed):
            go(config)
        monkeypatch.undo()
    resumed, records, _ = go(config)
    assert resumed.resumed_from
    timed = {"t", "tok_s", "mem_gb"}
    assert [{k: v for k, v in r.items() if k not in timed} for r in records] == [
        {k: v for k, v in r.items() if k not in timed} for r in all_of_it
    ]
    assert tensors(resumed) == tensors(whole)


# --- what it sees, against another way to the same number --------------------------------------------------------------------


class Quadratic:
    """Loss of a row: 1/2 ||s·B·A x - y||^2 summed, with x and y seeded by the row's first token. A toy `Task`."""

    worst = 1e9

    def weight(self, example: Example) -> int:
        return 1

    def loss(self, model: nn.Module, examples: Any) -> tuple[torch.Tensor, int]:
        x, y = zip(*(pair(e.input_ids[0]) for e in examples), strict=True)
        return (model(torch.stack(x)) - torch.stack(y)).square().sum() / 2, 0

    def measures(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"eval_loss": loss}


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, generator=generator).double(), torch.randn(5, generator=generator).double() + 1


def rows_of(*seeds: int) -> list[Example]:
    return [Example([seed], [], None, "row") for seed in seeds]


class Step:
    """One watched step of plain gradient descent on the toy."""

    def __init__(self, lr: float = 0.01, *, batches: int = 1, decay: float = 0.0, ratio: float = 1.0) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
        lk.attach(self.model, lk.LoRA(r=2, alpha=3.0), target_modules=["0"])
        ((_, self.layer, self.adapter),) = adapters(self.model)
        nn.init.normal_(self.adapter.lora_B, std=0.3)
        settings = OptimConfig(lr=lr, weight_decay=decay, b_ratio=ratio)
        groups = parameter_groups(self.model, "default", settings)
        self.optimizer = torch.optim.SGD(groups, lr=lr)
        self.task, self.said = Quadratic(), list[str]()
        own = {"every": 1, "last": 8, "cumulative": True, "say": self.said.append}
        self.watch = Watching(self.model, "default", self.task, self.optimizer, groups.factors, **own)
        self.batches = [rows_of(*range(4 * i, 4 * i + 4)) for i in range(batches)]

    def losses(self) -> torch.Tensor:
        return sum(self.task.loss(self.model, b)[0] for b in self.batches) / (4 * len(self.batches))

    def go(self, step: int = 0) -> dict[str, Any]:
        n = len(self.batches)
        for i, batch in enumerate(self.batches):
            (self.task.loss(self.model, batch)[0] / (4 * n)).backward()
            self.watch.gradient(step, i, n, 1 / n, 4)
        before = float(self.losses().detach())
        with self.watch.update(step, before, lambda: float(self.losses().detach())):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return self.watch.stepped({"step": step + 1, "epoch": 0.5, "loss": before}, 4 * n)


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


def test_the_gain_ratio_is_that_of_the_quadratic_model_of_the_step() -> None:
    step = Step(lr=0.02)
    parameters = [step.adapter.lora_A, step.adapter.lora_B]
    with plain():  # the fused operation has no second derivative
        g = flat(torch.autograd.grad(step.losses(), parameters, create_graph=True))
        Hg = flat(torch.autograd.grad(g @ g.detach(), parameters))
    g = g.detach()
    expected = 1 - 0.02 * float(g @ Hg) / (2 * float(g @ g))
    assert expected < 0.97
    assert step.go()["gain_ratio"] == pytest.approx(expected, abs=0.02)  # the loss is quartic in the factors


def test_norms_and_movement_are_those_of_the_dense_matrices() -> None:
    step = Step(lr=0.05, ratio=4.0)
    W, A, before = (
        step.layer.weight.detach(),
        step.adapter.lora_A.detach().clone(),
        step.adapter.delta_weight().detach(),
    )
    found = step.go()
    after = step.adapter.delta_weight().detach()
    assert found["rho"] == pytest.approx(float(after.norm() / W.norm()), rel=1e-9)
    assert found["rho_step"] == pytest.approx(float((after - before).norm() / W.norm()), rel=1e-9)
    assert found["A_movement"] == pytest.approx(float((step.adapter.lora_A.detach() - A).norm() / A.norm()), rel=1e-9)
    assert found["slope_mismatch"] < 1e-14


def test_the_slope_on_validation_rows_is_the_derivative_by_alpha() -> None:
    step, valid = Step(), rows_of(101, 102, 103, 104, 105)
    step.go()
    found = step.watch.evaluated({"step": 8, "eval_loss": 1.0}, valid)

    def loss(gamma: float) -> float:
        step.adapter.scale.mul_(gamma)
        value = float(step.task.loss(step.model, valid)[0].detach()) / len(valid)
        step.adapter.scale.div_(gamma)
        return value

    assert found["eval_slope"] == pytest.approx((loss(1 + 1e-4) - loss(1 - 1e-4)) / 2e-4, rel=1e-6)
    assert found["eval_slope_se"] > 0


def test_the_noise_scale_is_that_of_all_pairs_of_micro_batches() -> None:
    step = Step(batches=5)
    parameters = [step.adapter.lora_A, step.adapter.lora_B]
    each = []
    for batch in step.batches:
        gradient = torch.autograd.grad(step.task.loss(step.model, batch)[0] / 4, parameters)
        each.append(torch.cat([t.flatten() for t in gradient]))
    assert step.go()["noise_scale"] == pytest.approx(gain.noise_scale_of(each, 4).batch, rel=1e-9)


def test_decay_and_description_length_add_up_over_steps() -> None:
    step = Step(decay=0.1, lr=0.01)
    losses = [float(step.losses().detach())]
    for i in range(3):
        found = step.go(i)
        losses.append(float(step.losses().detach()))
    assert found["decay_survival"] == pytest.approx((1 - 0.01 * 0.1) ** 3)
    record = step.watch.evaluated({"step": 3, "eval_loss": 0.25}, rows_of(7))
    wanted = coding.excess_description_length(losses[:3], [4] * 3, 0.25)
    assert record["description_bits"] == pytest.approx(wanted)
    assert record["bits_per_parameter"] == pytest.approx(wanted / 22)


def test_a_wrong_backward_pass_is_noticed() -> None:
    step = Step()
    step.adapter.lora_A.register_hook(
        lambda g: 1.02 * g
    )  # two per cent off, as a wrong scale in a fused operation would be
    step.go()
    assert any("backward wrong" in text for text in step.said)
    right = Step()
    right.go()
    assert not any("backward wrong" in text for text in right.said)


def test_an_alarm_begins_late_and_ends_late() -> None:
    alarms = Alarms(rules("float32"))
    heard = [
        alarms.look({"gain_ratio": q}) for q in (0.4, 0.9, 0.4, float("nan"), 0.4, 0.6, 0.6, 0.7, 0.6, 0.7, 0.7, 0.2)
    ]
    assert [i for i, said in enumerate(heard) if said] == [4, 10]
    assert "optim.lr" in heard[4][0]
    assert alarms.on == []
    again = Alarms(rules("float32"))
    again.look({"gain_ratio": 0.4})
    resumed = Alarms(rules("float32"))
    resumed.restore(json.loads(json.dumps(again.state)))
    assert resumed.look({"gain_ratio": 0.4})


def test_a_rising_held_out_loss_is_overfitting_only_above_the_training_loss() -> None:
    for rate, level, told in ((-0.3, 1e6, True), (-0.3, 1e-6, False), (0.3, 1e6, False)):
        step, valid = Step(), rows_of(101, 102)
        step.go()
        exponents = [
            step.watch.evaluated({"step": t, "eval_loss": level * t**-rate}, valid)["curve_exponent"] for t in (2, 4, 7)
        ]
        assert math.isnan(exponents[0])
        assert exponents[1:] == pytest.approx([rate, rate])
        assert ("rising" in step.watch.alarms.on) is told


def test_the_slope_waits_until_it_costs_little_except_at_the_end() -> None:
    step, valid = Step(), rows_of(*range(101, 121))
    step.go()
    asked: list[int] = []
    taken = step.watch._slope

    def slope(rows: Sequence[Example], count: int) -> tuple[float, float]:
        asked.append(count)
        return taken(rows, count)

    step.watch._slope = slope
    for step_number, rows in ((1, 7 * 250), (2, 8 * 250), (3, 10**6), (8, 0)):
        step.watch.kept.rows = rows
        found = step.watch.evaluated({"step": step_number, "eval_loss": 1.0}, valid)
        assert math.isnan(found["eval_slope"]) == (step_number == 1)
    assert asked == [8, 32, 8] and step.watch.kept.rows == 0


def test_too_strong_is_overfit_only_where_the_training_rows_have_the_lower_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for held_out, name in ((1e6, "overfit"), (1e-6, "too_strong")):
        for noise, alarms in ((0.01, [name]), (0.4, [])):
            step = Step()
            step.go()
            monkeypatch.setattr(step.watch, "_slope", lambda rows, count, noise=noise: (0.5, noise))
            assert step.watch.evaluated({"step": 8, "eval_loss": held_out}, rows_of(101, 102))["alarms"] == alarms


def test_an_alarm_about_strength_ends_when_its_cause_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step()
    step.go()
    monkeypatch.setattr(step.watch, "_slope", lambda rows, count: (0.5, 0.01))
    heard = [step.watch.evaluated({"step": 8, "eval_loss": loss}, rows_of(101, 102))["alarms"] for loss in (1e-6, 1e6)]
    assert heard == [["too_strong"], ["overfit"]]
