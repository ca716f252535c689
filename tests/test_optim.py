"""Laws of the parameter groups (LoRA+), the optimizers and the schedules."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.adapter import Shape
from lorakit.core.errors import UsageError
from lorakit.core.start import needs
from lorakit.optim import OPTIMIZERS, SCHEDULES, parameter_groups, role, scale_learning_rates, schedule


@dataclass(frozen=True)
class Settings:
    lr: float = 1e-2
    b_ratio: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 5, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(self.norm(self.up(self.embed(ids)))))


def net(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return lk.attach(Net().double(), lk.LoRA(r=2, alpha=4), **options).double()


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.arange(11)).square().sum().backward()


def stepped(model: nn.Module, settings: Settings, steps: int = 1) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Train; give (before, after, last gradient) of each trainable parameter."""
    optimizer = OPTIMIZERS["adamw"](parameter_groups(model, "default", settings), settings)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(steps):
        backward(model)
        optimizer.step()
    after = dict(model.named_parameters())
    return {n: (b, after[n].detach(), after[n].grad) for n, b in before.items()}


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_first_adam_step_moves_b_by_its_rate_and_leaves_a(ratio: float) -> None:
    moved = stepped(net(target_modules=["up", "down"]), Settings(b_ratio=ratio))
    assert len(moved) == 4
    for name, (before, after, gradient) in moved.items():
        if name.endswith("lora_A"):
            assert torch.equal(before, after)
            assert torch.equal(gradient, torch.zeros_like(gradient))
        else:
            assert gradient.abs().min() > 1e-6  # otherwise eps would blur the sign
            torch.testing.assert_close(after, -ratio * 1e-2 * gradient.sign(), rtol=1e-5, atol=0)


def test_in_an_embedding_a_starts_at_zero_and_is_the_fast_factor() -> None:
    moved = stepped(net(target_modules=["embed"]), Settings(b_ratio=16.0))
    (a, b) = (next(v for n, v in moved.items() if n.endswith(leaf)) for leaf in ("lora_A", "lora_B"))
    assert torch.equal(b[0], b[1])
    used = a[2].abs() > 1e-9
    assert used.any()
    torch.testing.assert_close(a[1][used], -16 * 1e-2 * a[2][used].sign(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", sorted(name for name in lk.METHODS if not needs(lk.METHODS[name]())))
def test_the_fast_factor_in_an_embedding_is_the_one_that_starts_at_zero(name: str) -> None:
    """What the methods declare against their start itself: A for LoRA, B for LoRA-FA (its A is frozen) and VeRA."""
    fields = lk.METHODS[name].__dataclass_fields__
    torch.manual_seed(0)
    try:
        method = lk.METHODS[name](**({"r": 2} if "r" in fields and "init_r" not in fields else {}))
        model = lk.attach(Net(), method, target_modules=["embed"])
    except UsageError as refusal:
        pytest.skip(str(refusal))
    factors = [g for g in parameter_groups(model, "default", Settings(b_ratio=16.0)) if g["role"] in ("A", "B")]
    zero = {g["role"] for g in factors if not any(p.any() for _, p in g["params"])}
    fast = {g["role"] for g in factors if g["lr"] == 16e-2}
    assert fast == zero or not zero  # AdaLoRA starts both at random and E at zero
    assert fast == {"lora": {"A"}, "lora_fa": {"B"}, "vera": {"B"}}.get(name, fast)


def test_ratio_one_is_plain_adamw() -> None:
    settings = Settings(weight_decay=0.1, eps=1e-8)
    ours = stepped(net(), settings, steps=5)
    model = net()
    plain = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1, eps=1e-8, foreach=False
    )
    for _ in range(5):
        backward(model)
        plain.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name][1], parameter, rtol=1e-12, atol=1e-15)


def test_groups_hold_every_trainable_parameter_once_with_its_role() -> None:
    model = net(target_modules=["embed", "up", "down"], modules_to_save=["head", "norm"])
    settings = Settings(b_ratio=4.0, weight_decay=0.1)
    groups = parameter_groups(model, "default", settings)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert [(g["role"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("A", 1e-2, 0.1),  # of the linear layers
        ("A", 4e-2, 0.1),  # of the embedding
        ("B", 1e-2, 0.1),
        ("B", 4e-2, 0.1),
        ("base", 1e-2, 0.1),
        ("bias", 1e-2, 0.0),
        ("norm", 1e-2, 0.0),
    ]
    of = {name.rpartition("adapters.default.")[::2]: g["role"] for g in groups for name, _ in g["params"]}
    assert {leaf: kind for (path, leaf), kind in of.items() if path == "norm."} == {
        "copy.weight": "norm",
        "copy.bias": "bias",
    }
    again = parameter_groups(model, "default", settings)
    assert [[n for n, _ in g["params"]] for g in again] == [[n for n, _ in g["params"]] for g in groups]
    everything = parameter_groups(model, "default", settings, decayed={"A", "B", "base", "bias", "norm"})
    assert {g["weight_decay"] for g in everything} == {0.1}


def test_a_shared_parameter_is_in_one_group() -> None:
    model = net(target_modules=["up"])
    model.head.weight.requires_grad_(True)
    model.tied = nn.Linear(5, 3)
    model.tied.weight = model.head.weight
    model.tied.bias.requires_grad_(False)
    groups = parameter_groups(model, "default", Settings())
    assert [n for g in groups for n, _ in g["params"]].count("head.weight") == 1
    assert sum(len(g["params"]) for g in groups) == 3


@pytest.mark.parametrize("name", sorted(lk.METHODS))
def test_every_method_declares_a_known_role_for_every_parameter(name: str) -> None:
    adapter = lk.METHODS[name]().build(Shape(8, 8))
    parts = [(n, adapter) for n, _ in adapter.named_parameters()]
    assert parts
    assert {role(n, a) for n, a in parts} <= {"A", "B", "magnitude", "bias", "base", "other", "frozen"}


def test_nothing_or_the_wrong_adapter_to_train_is_an_error() -> None:
    model = net()
    lk.attach(model, lk.LoRA(r=2), name="second")
    with pytest.raises(UsageError, match="second"):
        parameter_groups(model, "default", Settings())
    with pytest.raises(UsageError, match="nothing to train"):
        parameter_groups(model.requires_grad_(False), "default", Settings())


def test_plain_gradient_descent_is_exact() -> None:
    settings = Settings(betas=(0.0, 0.0), b_ratio=3.0)
    model = net(target_modules=["down"])
    optimizer = OPTIMIZERS["sgd"](parameter_groups(model, "default", settings), settings)
    B = next(p for n, p in model.named_parameters() if n.endswith("lora_B"))
    backward(model)
    optimizer.step()
    torch.testing.assert_close(B.detach(), -3e-2 * B.grad, rtol=1e-12, atol=0)


def test_optimizers_are_the_files_and_an_unknown_one_is_named() -> None:
    assert {"adamw", "sgd"} <= set(OPTIMIZERS)
    assert not {"groups", "schedules"} & set(OPTIMIZERS)
    with pytest.raises(UsageError, match="adamww"):
        OPTIMIZERS["adamww"]


def test_all_groups_follow_the_schedule_in_proportion() -> None:
    settings = Settings(b_ratio=16.0)
    model = net(target_modules=["up"])
    optimizer = OPTIMIZERS["adamw"](parameter_groups(model, "default", settings), settings)
    for multiplier in (0.5, 0.25, 1.0):
        scale_learning_rates(optimizer, multiplier)
        assert [g["lr"] for g in optimizer.param_groups] == [1e-2 * multiplier, 16e-2 * multiplier]


GOLDEN: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedule_values(name: str) -> None:
    at = schedule(name, total=110, warmup=10)
    assert [at(s) for s in range(10)] == [(s + 1) / 10 for s in range(10)]
    assert at(10) == 1.0
    for step in range(10, 110):
        assert at(step) == pytest.approx(GOLDEN[name]((step - 10) / 100), abs=1e-12)
    assert at(110) == pytest.approx(GOLDEN[name](1.0), abs=1e-30)
    assert at(10_000) == at(110)


@pytest.mark.parametrize(
    ("total", "warmup", "expected"),
    [(100, 0.03, 3), (100, 0.0, 0), (100, 0.07, 7), (39, 0.03, 2), (100, 1, 1), (100, 20, 20), (5, 20, 5), (1, 0.5, 1)],
)
def test_warmup_is_a_fraction_below_one_and_steps_from_one_on(total: int, warmup: float, expected: int) -> None:
    at = schedule("constant", total, warmup)
    assert sum(at(s) < 1 for s in range(total)) == max(expected - 1, 0)
    if expected:
        assert at(0) == pytest.approx(1 / expected)


def test_linear_agrees_with_transformers() -> None:
    get = pytest.importorskip("transformers.optimization").get_linear_schedule_with_warmup
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get(optimizer, 0, 50)
    at = schedule("linear", 50)
    for step in range(50):
        assert at(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("bad", [("cosin", 10, 0.0), ("cosine", 10, -1.0)])
def test_wrong_schedule_settings_are_errors(bad: tuple[str, int, float]) -> None:
    with pytest.raises(UsageError):
        schedule(*bad)
