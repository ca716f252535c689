"""AdaLoRA's budget: the authors' schedule, PEFT's choices on the same gradients, planted ranks that are found."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.train import loop
from lorakit.train.config import RunConfig
from lorakit.train.config_file import loads
from lorakit.train.controllers import CONTROLLERS, Run
from lorakit.train.controllers.adalora import AdaLoRABudget, budget
from lorakit.train.progress import Progress
from lorakit.train.run import RunResult, run

AdaLoRA = lk.METHODS["adalora"]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6)).to(dtype)


def start(model: nn.Module, total: int, **settings: Any) -> AdaLoRABudget:
    around = Run(model, "default", total, lambda step: 1.0, 0, 0)
    return CONTROLLERS["adalora"](**settings).start(around)


def triplets(model: nn.Module) -> list[Tensor]:
    return [adapter.lora_E for _, _, adapter in lk.adapters(model)]


def left(model: nn.Module) -> list[int]:
    return [int(E.count_nonzero()) for E in triplets(model)]


def test_golden_schedule() -> None:
    golden = {0: 144, 20: 144, 21: 142, 30: 133, 50: 117, 80: 103, 110: 97, 140: 96, 150: 96, 151: 96, 200: 96}
    assert {t: budget(t, 144, 96, tinit=20, tfinal=50, total=200) for t in golden} == golden


@pytest.mark.parametrize(("tinit", "tfinal"), [(0, 0), (3, 0), (0, 7), (5, 9)])
def test_the_schedule_is_pefts(tinit: int, tfinal: int) -> None:
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=tinit, tfinal=tfinal, total_step=30, target_modules=["0", "2", "4"]
    )
    theirs = peft.get_peft_model(network(), config).base_model.rankallocator
    mine = [budget(t, 18, 6, tinit=tinit, tfinal=tfinal, total=30) for t in range(31)]
    assert mine == [theirs.budget_schedule(t)[0] for t in range(31)]


def step(
    model: nn.Module, control: AdaLoRABudget, optimizer: torch.optim.Optimizer, t: int, x: Tensor, y: Tensor
) -> float:
    optimizer.zero_grad()
    loss = (model(x) - y).square().sum(1).mean()
    loss.backward()
    penalty = control.penalty()
    if penalty is not None:
        penalty.backward()
    optimizer.step()
    control.after_update(t, optimizer)
    return float(loss.detach())


class WithLoss(nn.Module):
    """A model whose output has a loss, to which PEFT adds its penalty."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.network(x) - y).square().sum(1).mean())


@pytest.mark.parametrize("deltaT", [1, 3])
def test_every_step_is_pefts(deltaT: int) -> None:
    """The same start and the same data: weights, penalty, scores, choices and the phase after them, all by Adam."""
    total, settings = 40, {"tinit": 5, "tfinal": 10, "deltaT": deltaT, "orth_reg_weight": 0.5}
    ours = lk.attach(network(), AdaLoRA(init_r=6, target_r=2, alpha=12))
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=12, total_step=total, target_modules=["0", "2", "4"], **settings
    )
    theirs = peft.get_peft_model(WithLoss(network()), config, autocast_adapter_dtype=False)
    their_layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.adalora.SVDLinear)]
    their_weights = [[getattr(m, n)["default"] for n in ("lora_A", "lora_E", "lora_B")] for m in their_layers]
    with torch.no_grad():
        for (_, _, adapter), weights in zip(lk.adapters(ours), their_weights, strict=True):
            for mine, other in zip(adapter.parameters(), weights, strict=True):
                other.data = mine.detach().clone()
    for layer in their_layers:
        layer.ranknum["default"].requires_grad_(
            False
        )  # PEFT would train it on a base that is not fp32, and not save it
    control = start(ours, total, **settings)
    optimizers = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (ours, theirs)]
    kept = []
    for t in range(total):
        torch.manual_seed(t)
        x, y = torch.randn(16, 9).double(), torch.randn(16, 6).double()
        step(ours, control, optimizers[0], t, x, y)
        optimizers[1].zero_grad()
        theirs.base_model(x, y).loss.backward()
        optimizers[1].step()
        theirs.base_model.update_and_allocate(t + 1)
        for (_, _, adapter), weights in zip(lk.adapters(ours), their_weights, strict=True):
            for mine, other in zip(adapter.parameters(), weights, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
            assert torch.equal(adapter.lora_E == 0, weights[1] == 0), f"step {t}"
        kept.append(sum(left(ours)))
    assert kept[4] == 18
    assert kept[-1] == 6
    assert len(set(kept)) > 3


def test_what_is_left_is_the_budget_after_each_choice() -> None:
    model = lk.attach(network(), AdaLoRA(init_r=6, target_r=2))
    control = start(model, 40, tinit=4, tfinal=10, deltaT=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for t in range(40):
        torch.manual_seed(t)
        step(model, control, optimizer, t, torch.randn(16, 9).double(), torch.randn(16, 6).double())
        if (4 < t + 1 < 30 and (t + 1) % 3 == 0) or t + 1 >= 30:
            assert sum(left(model)) == control.budget(t + 1)
    assert not control.sensitivity, "nothing is measured any more after the last choice"


@pytest.mark.parametrize("count", [18, 10, 7, 6, 1])
def test_equal_scores_are_shared_out(count: int) -> None:
    """All scores zero (nothing measured) or all the same: exactly the budget is left, spread over the layers."""
    for value in (None, 1.0):
        model = lk.attach(network(), AdaLoRA(init_r=6, target_r=2))
        control = start(model, 40)
        with torch.no_grad():
            for E in triplets(model):
                E.fill_(1.0)
        if value is not None:
            for key, weight in control._weights():
                control.sensitivity[key], control.uncertainty[key] = (torch.full_like(weight, value) for _ in range(2))
        control.choose(count)
        assert sum(left(model)) == count
        assert max(left(model)) - min(left(model)) <= 1


def test_a_target_that_is_the_start_prunes_nothing() -> None:
    """PEFT cannot: RuntimeError, selected number k out of range."""
    model = lk.attach(network(), AdaLoRA(init_r=3, target_r=3))
    control = start(model, 20, deltaT=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for t in range(20):
        step(model, control, optimizer, t, torch.randn(16, 9).double(), torch.randn(16, 6).double())
        assert left(model) == [3, 3, 3]


def test_the_penalty() -> None:
    model = lk.attach(network(), AdaLoRA(init_r=5, target_r=2))
    control = start(model, 20, orth_reg_weight=0.3)
    layers = [a for _, _, a in lk.adapters(model)]
    eye = torch.eye(5).double()
    norms = [n for a in layers for n in ((a.lora_A @ a.lora_A.T - eye).norm(), (a.lora_B.T @ a.lora_B - eye).norm())]
    torch.testing.assert_close(control.penalty(), 0.3 * sum(norms) / 6)
    for a in layers:
        nn.init.orthogonal_(a.lora_A)
        nn.init.orthogonal_(a.lora_B)
    assert control.penalty().detach() < 1e-14
    control.penalty().backward()
    assert all(a.lora_A.grad.isfinite().all() for a in layers)
    assert start(model, 20, orth_reg_weight=0.0).penalty() is None


@pytest.mark.parametrize("seed", range(3))
def test_planted_ranks_are_found(seed: int) -> None:
    """Two layers whose targets have ranks 1 and 7, a budget of 8, and noise in the data."""
    side, total = 24, 200
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Linear(side, side, bias=False), "b": nn.Linear(side, side, bias=False)})
    lk.attach(model, AdaLoRA(init_r=8, target_r=4, alpha=8), target_modules=["a", "b"])
    teacher = {}
    for name, r in {"a": 1, "b": 7}.items():
        U, V = (torch.linalg.qr(torch.randn(side, r))[0] for _ in range(2))
        teacher[name] = model[name].weight.detach() + U @ V.T
    control = start(model, total, tinit=0.2, tfinal=0.4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0)
    for t in range(total):
        x = torch.randn(32, side)
        noise = {name: 0.3 * torch.randn(32, side) for name in teacher}
        loss = sum((model[n](x) - x @ W.T - noise[n]).square().sum(1).mean() for n, W in teacher.items())
        optimizer.zero_grad()
        (loss + control.penalty()).backward()
        optimizer.step()
        control.after_update(t, optimizer)
    assert left(model) == [1, 7]
    for name, W in teacher.items():
        change, wanted = model[name].adapters["default"].delta_weight(), W - model[name].weight
        assert (change - wanted).norm() < 0.25 * wanted.norm()


def test_the_state_is_everything() -> None:
    """Two controllers, one with the other's state: the same steps from there on, before and after the last choice."""
    torch.manual_seed(1)
    batches = [(torch.randn(16, 9).double(), torch.randn(16, 6).double()) for _ in range(30)]

    def fresh() -> tuple[nn.Module, AdaLoRABudget, torch.optim.Optimizer]:
        model = lk.attach(network(), AdaLoRA(init_r=6, target_r=2))
        return (
            model,
            start(model, 30, deltaT=4),
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5e-2),
        )

    whole = fresh()
    for at in range(30):
        again = fresh()
        tensors, scalars = whole[1].state()
        again[1].restore({key: value.clone() for key, value in tensors.items()}, json.loads(json.dumps(scalars)))
        again[0].load_state_dict(whole[0].state_dict())
        for model, control, optimizer in (whole, again):
            step(model, control, optimizer, at, *batches[at])
        mine, theirs = whole[1].state()[0], again[1].state()[0]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert all(torch.equal(a, b) for a, b in zip(triplets(whole[0]), triplets(again[0]), strict=True))


class Silent(Progress):
    def __init__(self) -> None:
        super().__init__(0, live=False)

    def _write(self, text: str) -> None:
        pass


@pytest.fixture
def configure(tiny_model: Path, rows: Callable[..., Path], tmp_path: Path) -> Callable[[str], RunConfig]:
    data = rows()

    def make(name: str) -> RunConfig:
        settings: dict[str, Any] = {
            "model.name": str(tiny_model),
            "model.dtype": "float32",
            "data.path": str(data),
            "method.name": "adalora",
            "method.init_r": 4,
            "method.target_r": 2,
            "method.dropout": 0.1,
            "optim.lr": 3e-3,
            "train.batch_size": 3,
            "train.epochs": 1,
            "train.save_steps": 2,
            "train.controller": {"name": "adalora", "tinit": 1, "tfinal": 2, "deltaT": 2},
            "output": str(tmp_path / name),
        }
        return loads("", [f"{key}={json.dumps(value)}" for key, value in settings.items()])[0]

    return make


def go(config: RunConfig) -> RunResult:
    return run(config, progress=Silent())


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_bit_for_bit_and_saves_what_is_left(
    configure: Callable[[str], RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(configure("whole"))
    config, real = configure("killed"), loop.update
    for at in (3, 5, 7):  # while the budget falls, just before the last choice, after it

        def update(job: Any, state: Any, window: Any, at: int = at) -> Any:
            if state.step == at:
                raise Killed
            return real(job, state, window)

        monkeypatch.setattr(loop, "update", update)
        with pytest.raises(Killed):
            go(config)
    monkeypatch.undo()
    again = go(config)
    files = [r.adapter / "adapter_model.safetensors" for r in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    side = json.loads((whole.adapter / "lorakit.json").read_text())
    ranks = [
        sum(mask) for mask in json.loads((whole.adapter / "adapter_config.json").read_text())["rank_pattern"].values()
    ]
    assert side["method"]["name"] == "adalora"
    assert len(ranks) == 21
    assert sum(ranks) == 2 * 21
    assert whole.steps == 8


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"tinit": 10, "tfinal": 10}, "no step to fall"),
        ({"tinit": -1}, "tinit"),
        ({"beta1": 1.0}, "beta1"),
        ({"deltaT": 0}, "deltaT"),
    ],
)
def test_impossible_settings_are_refused(bad: dict[str, Any], words: str) -> None:
    model = lk.attach(network(), AdaLoRA())
    with pytest.raises(UsageError, match=words):
        start(model, 20, **bad)


def test_it_belongs_to_its_method() -> None:
    module = CONTROLLERS.module("adalora")
    assert module.METHOD_NAME == "adalora"
    assert module.refuses(AdaLoRA()) is None
    assert module.refuses(lk.LoRA())
    with pytest.raises(UsageError, match="nothing to prune"):
        start(lk.attach(network(), lk.LoRA()), 20)
