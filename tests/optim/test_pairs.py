"""Pairs of factors by their roles, what is refused, and the state of each optimizer through a checkpoint."""

from typing import Any

import pytest
import torch
from problem import Problem, Settings, advance, mixed, trained
from torch import nn

import lorakit as lk
from lorakit.core.chain import Chain
from lorakit.core.errors import UsageError
from lorakit.optim import OPTIMIZERS, parameter_groups, state_bytes
from lorakit.train.checkpoint import optimizer_tensors, restore_optimizer

OWN: dict[str, dict[str, Any]] = {
    "adamw": {},
    "flora": {"options": {"rank": 3, "refresh": 2}},
    "flora without momentum": {"betas": (0.0, 0.999)},
    "galore": {"options": {"rank": 2, "refresh": 2}},
    "galore sgd": {"options": {"rank": 2, "refresh": 2, "inner": "sgd"}},
    "lora_fa": {},
    "lora_pro": {},
    "lora_pro sgd": {"options": {"adam": False}},
    "muon": {},
    "riemannian": {},
    "sgd": {},
}


def make(case: str, model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    settings = Settings(weight_decay=0.1, **{**OWN[case], **more})
    return OPTIMIZERS[case.split()[0]](parameter_groups(model, "default", settings), settings)


def test_factors_are_paired_by_role_in_every_composition() -> None:
    model = lk.attach(
        nn.ModuleDict(
            {"qkv": nn.Linear(6, 12), "out": nn.Linear(6, 5), "embed": nn.Embedding(7, 6), "full": nn.Linear(3, 3)}
        ),
        lk.LoRA(r=2, init="pissa"), target_modules=["qkv.v", "qkv.q", "out", "embed"], modules_to_save=["full"],
        rank_pattern={"out": 3}, fused={"qkv": {"q": 4, "k": 4, "v": 4}},
    )  # fmt: skip
    factors = parameter_groups(model, "default", Settings()).factors
    modules = dict(model.named_modules())
    assert [f.path for f in factors] == [
        "qkv.adapters.default.parts.q.live",
        "qkv.adapters.default.parts.v.live",
        "out.adapters.default.live",
        "embed.adapters.default",
    ]
    assert isinstance(modules["out.adapters.default"], Chain)
    for f in factors:
        holder = modules[f.path]
        assert (f.A, f.B, f.scale) == (holder.lora_A, holder.lora_B, holder.scale)
        assert f.A.shape[0] == f.B.shape[1]
    covered = {id(p) for f in factors for p in (f.A, f.B)}
    assert covered == {id(p) for n, p in trained(model).items() if "lora_" in n}


def test_the_order_of_parameters_plays_no_part() -> None:
    """B registered before A, and another layer's factors between: LoRA-FA's projection is the same."""
    one, two = Problem(), Problem()
    del two.adapter._parameters["lora_A"]
    two.adapter.register_parameter("lora_A", two.A)
    assert [n for n, _ in two.adapter.named_parameters()] == ["lora_B", "lora_A"]
    for p in (one, two):
        p.step(p.optimizer("lora_fa"))
    assert torch.equal(one.B, two.B)
    assert torch.equal(one.A, two.A)


def test_a_frozen_a_is_found_and_a_diagonal_between_is_seen() -> None:
    frozen = Problem(lk.METHODS["lora_fa"](r=2, alpha=4))
    (pair,) = parameter_groups(frozen.model, "default", Settings()).factors
    assert pair.A is frozen.A and pair.scale is not None and not pair.A.requires_grad
    model = lk.attach(nn.Sequential(nn.Linear(6, 5)), lk.METHODS["adalora"](target_r=2, init_r=3))
    (pair,) = parameter_groups(model, "default", Settings()).factors
    assert pair.scale is None


@pytest.mark.parametrize("case", OWN)
def test_state_goes_through_a_checkpoint_bit_for_bit(case: str) -> None:
    whole, part, rest = mixed(), mixed(), mixed()
    advance(whole, make(case, whole), 0, 7)
    optimizer = make(case, part)
    advance(part, optimizer, 0, 4)
    tensors, scalars = optimizer_tensors(optimizer)
    again = make(case, rest)
    rest.load_state_dict(part.state_dict())
    restore_optimizer(again, {k: v.clone() for k, v in tensors.items()}, scalars)
    assert state_bytes(again) == state_bytes(optimizer)
    advance(rest, again, 4, 7)
    moved = [n for n, p in whole.named_parameters() if p.requires_grad]
    for name, p in whole.named_parameters():
        assert torch.equal(p, rest.get_parameter(name)), name
    assert moved


@pytest.mark.parametrize("case", OWN)
def test_every_trained_parameter_moves_and_the_rest_stays(case: str) -> None:
    model = mixed()
    optimizer = make(case, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    advance(model, optimizer, 0, 3)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    frozen_A = {n for n in before if n.endswith("lora_A")} if case == "lora_fa" else set()
    assert moved == set(trained(model)) == set(trained(mixed())) - frozen_A


@pytest.mark.parametrize("case", sorted(set(OWN) - {"sgd"}))
def test_the_loss_falls(case: str) -> None:
    model, ids = mixed(), torch.arange(10).reshape(2, 5)
    rate = {"lora_pro sgd": 1e-3, "galore sgd": 0.1, "flora": 5e-2, "flora without momentum": 5e-2}.get(case, 1e-2)
    optimizer, losses = make(case, model, lr=rate), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(ids) - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


REFUSED = [
    ("lora_fa", "bitfit", {}, "needs the two factors"),
    ("lora_pro", "bitfit", {}, "needs the two factors"),
    ("riemannian", "bitfit", {}, "needs the two factors"),
    ("muon", "bitfit", {}, "nothing to work on"),
    ("lora_fa", "adalora", {}, "nothing else"),
    ("lora_pro", "adalora", {}, "nothing else"),
    ("lora_fa", "dora", {}, "nothing else"),
    ("lora_pro", "lora_fa", {}, "is frozen"),
    ("lora_pro", "lora", {"b_ratio": 4.0}, "one rate for A and B"),
    ("galore", "lora", {"options": {"rank": 20}}, "the longest short side is 8"),
    ("flora", "lora", {"options": {"rank": 20}}, "nothing to compress"),
]


@pytest.mark.parametrize(("optimizer", "method", "settings", "reason"), REFUSED)
def test_what_an_optimizer_cannot_work_with_is_refused_with_the_reason(
    optimizer: str, method: str, settings: dict[str, Any], reason: str
) -> None:
    model = lk.attach(
        nn.Sequential(nn.Linear(10, 12)), lk.METHODS[method](**({"r": 8} if method in ("lora", "lora_fa") else {}))
    )
    given = Settings(**settings)
    with pytest.raises(UsageError, match=r"optim\.name: ") as raised:
        OPTIMIZERS[optimizer](parameter_groups(model, "default", given), given)
    assert reason in str(raised.value)
    assert raised.value.fix


@pytest.mark.parametrize(("targets", "init"), [(["embed"], "kaiming"), (["one"], "init_b")])
def test_lora_fa_refuses_an_a_that_is_zero(targets: list[str], init: str) -> None:
    model = mixed(lk.LoRA(r=2, init=init), targets)
    with pytest.raises(UsageError, match="its A is zero"):
        make("lora_fa", model)


def test_state_bytes_are_those_of_the_formulas() -> None:
    """n = r(in + out): AdamW 2 n and a count per tensor, Muon n, LoRA-FA only B's, LoRA-Pro 2 in out."""
    sizes = {}
    for name in ("adamw", "muon", "lora_fa", "lora_pro", "riemannian", "sgd"):
        model = lk.attach(nn.Sequential(nn.Linear(100, 50, bias=False)), lk.LoRA(r=4))
        settings = Settings(betas=(0.0, 0.0) if name == "sgd" else (0.9, 0.999))
        optimizer = OPTIMIZERS[name](parameter_groups(model, "default", settings), settings)
        model(torch.ones(2, 100)).square().sum().backward()
        optimizer.step()
        sizes[name] = state_bytes(optimizer) // 4
    n = 4 * (100 + 50)
    assert sizes == {
        "adamw": 2 * n + 2,
        "riemannian": 2 * n + 2,
        "muon": n,
        "lora_fa": 2 * 4 * 50 + 1,
        "lora_pro": 2 * 100 * 50,
        "sgd": 0,
    }


@pytest.mark.parametrize("case", ["lora_fa", "riemannian"])
def test_a_closure_is_refused_where_it_would_undo_the_change_of_the_gradients(case: str) -> None:
    model = mixed()
    optimizer = make(case, model)
    with pytest.raises(UsageError, match="closure"):
        optimizer.step(lambda: 0.0)
