"""MoLoRA: LoRA where it is LoRA, the sum over experts where it is not, routing, and the penalty that spreads it."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.methods.molora import balance_loss
from lorakit.train.controllers import CONTROLLERS, Run, brought

from .problem import OUT, ROWS, Problem, close, perturb

MoLoRA = lk.METHODS["molora"]
Y = torch.linspace(-1, 1, OUT).double()


def problem(**settings: Any) -> Problem:
    p = Problem(MoLoRA(**{"r": 2, "num_experts": 3, "alpha": 5, **settings}))
    perturb(p.adapter)
    return p


def by_hand(p: Problem, weights: Tensor) -> Tensor:
    """W x + b + s sum_i p_i B_i A_i x, one expert and one token after the other."""
    a, s = p.adapter, float(p.adapter.scale)
    rows = []
    for x, weight in zip(p.x, weights, strict=True):
        y = p.W @ x + p.layer.bias
        for i in range(a.config.num_experts):
            y = y + s * weight[i] * (a.lora_B[i] @ (a.lora_A[i] @ x))
        rows.append(y)
    return torch.stack(rows)


def test_it_is_the_sum_over_experts_weighed_by_the_router() -> None:
    p = problem()
    weights = (p.x @ p.adapter.router.T).softmax(-1)
    assert weights.std(0).min() > 0.05, "the router must tell the tokens apart"
    close(p.model(p.x), by_hand(p, weights))


@pytest.mark.parametrize("k", [1, 2])
def test_top_k_keeps_the_largest_and_divides_by_their_sum(k: int) -> None:
    p = problem(top_k=k)
    weights = (p.x @ p.adapter.router.T).softmax(-1).detach()
    for row in weights:
        row[row.argsort()[: 3 - k]] = 0
        row /= row.sum()
    assert all(int((row > 0).sum()) == k for row in weights)
    close(p.model(p.x), by_hand(p, weights))
    p.backward()
    assert p.adapter.lora_B.grad.abs().sum((1, 2)).gt(0).all(), "every expert has tokens here"
    if k == 1:  # its weight is 1 whatever the router says
        close(p.adapter.router.grad, torch.zeros_like(p.adapter.router))


def test_top_n_of_n_is_the_soft_router_bit_for_bit() -> None:
    soft, all_of_them = problem().backward(), problem(top_k=3).backward()
    assert torch.equal(soft.model(soft.x), all_of_them.model(soft.x))
    for a, b in zip(soft.parameters(), all_of_them.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def as_lora(p: Problem, A: Tensor, B: Tensor) -> nn.Module:
    model = lk.attach(copy.deepcopy(p.base), lk.LoRA(r=2, alpha=5))
    ((_, _, adapter),) = lk.adapters(model)
    with torch.no_grad():
        adapter.lora_A.copy_(A)
        adapter.lora_B.copy_(B)
    return model


@pytest.mark.parametrize("top_k", [None, 1])
def test_one_expert_is_lora_also_merged(top_k: int | None) -> None:
    p = problem(num_experts=1, top_k=top_k)
    lora = as_lora(p, p.adapter.lora_A[0], p.adapter.lora_B[0])
    close(p.model(p.x), lora(p.x), 1e-13)
    p.backward()
    (0.5 * (lora(p.x) - p.y).square().sum()).backward()
    ((_, _, other),) = lk.adapters(lora)
    close(p.adapter.lora_A.grad[0], other.lora_A.grad)
    close(p.adapter.lora_B.grad[0], other.lora_B.grad)
    y = p.model(p.x)
    close(lk.merge(p.model)(p.x), y)
    close(lk.merge(lora)(p.x), y)


@pytest.mark.parametrize("top_k", [None, 2])
def test_equal_experts_are_one_lora_whatever_the_router_says(top_k: int | None) -> None:
    p = problem(top_k=top_k)
    with torch.no_grad():
        p.adapter.lora_A.copy_(p.adapter.lora_A[0].expand(3, -1, -1).clone())
        p.adapter.lora_B.copy_(p.adapter.lora_B[0].expand(3, -1, -1).clone())
    close(p.model(p.x), as_lora(p, p.adapter.lora_A[0], p.adapter.lora_B[0])(p.x))


def test_b_at_zero_is_the_base_bit_for_bit() -> None:
    p = problem(top_k=2)
    nn.init.zeros_(p.adapter.lora_B)
    assert torch.equal(p.model(p.x), p.base(p.x))


def test_experts_start_apart_and_a_has_no_gradient() -> None:
    p = Problem(MoLoRA(r=2)).backward()
    A = p.adapter.lora_A
    assert len({tuple(a.flatten().tolist()) for a in A}) == 4
    close(A.grad, torch.zeros_like(A))
    close(p.adapter.router.grad, torch.zeros_like(p.adapter.router))


def test_several_experts_cannot_be_merged() -> None:
    p = problem()
    assert not p.adapter.mergeable()
    with pytest.raises(UsageError, match="3 experts cannot be merged"):
        lk.merge(p.model)


@pytest.mark.parametrize(
    "wrong", [{"num_experts": 0}, {"top_k": 0}, {"top_k": 5}, {"init": "pissa"}, {"r": 0}, {"alpha": -1.0}]
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        MoLoRA(**wrong)


# --- the balance of sparse routing ---


def test_the_balance_loss_is_one_when_even_n_when_all_choose_one_and_switch_transformers_in_between() -> None:
    even, one = torch.full((6, 3), 1 / 3), torch.eye(3)[[1] * 6]
    assert float(balance_loss(even, torch.eye(3).repeat(2, 1), -1)) == pytest.approx(1)
    assert float(balance_loss(one, one, -1)) == pytest.approx(3)
    switch = pytest.importorskip("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
    torch.manual_seed(0)
    logits = torch.randn(40, 5)
    for k in (1, 2, 4):
        chosen = torch.zeros_like(logits).scatter(1, logits.topk(k).indices, 1.0)
        ours = balance_loss(logits.softmax(-1), chosen, -1)
        close(k * ours, switch((logits,), 5, k), 1e-6)
        image = lambda t: t.T.reshape(1, 5, 8, 5)  # noqa: E731  the same with channels before positions
        close(balance_loss(image(logits.softmax(-1)), image(chosen), -3), ours, 1e-6)


def balanced(p: Problem, factor: float = 0.7, batches: int = 2) -> Any:
    settings = CONTROLLERS["molora"](balance=factor)
    return settings.start(Run(p.model, "default", 10, lambda step: 1.0, 0, 0, lambda step: batches))


def test_the_penalty_joins_the_gradient_of_the_loss() -> None:
    """Against autograd on loss + factor / (layers · micro-batches) · balance, written down."""
    p, plain = problem(top_k=2), problem(top_k=2)
    balanced(p)
    p.backward()
    logits = plain.x @ plain.adapter.router.T
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 1.0)
    (plain.loss() + 0.7 / 2 * balance_loss(logits.softmax(-1), chosen, -1)).backward()
    assert torch.equal(p.model(p.x), plain.model(p.x))
    for a, b in zip(p.parameters(), plain.parameters(), strict=True):
        close(a.grad, b.grad)
    assert (p.adapter.router.grad - problem(top_k=2).backward().adapter.router.grad).norm() > 1e-3


def test_the_penalty_is_off_without_a_controller_and_in_evaluation() -> None:
    p, plain = problem(top_k=2), problem(top_k=2)
    balanced(p)
    p.model.eval(), plain.model.eval()
    assert torch.equal(p.backward().adapter.router.grad, plain.backward().adapter.router.grad)
    p.model.train(), plain.model.train()
    assert float(plain.adapter.balance) == 0
    assert not torch.equal(p.backward().adapter.router.grad, plain.backward().adapter.router.grad)


def test_recomputing_activations_counts_it_once() -> None:
    p, again = problem(top_k=2), problem(top_k=2)
    balanced(p), balanced(again)
    p.backward()
    y = torch.utils.checkpoint.checkpoint(again.model, again.x, use_reentrant=False)
    (0.5 * (y - again.y).square().sum()).backward()
    close(again.adapter.router.grad, p.adapter.router.grad)


def test_the_penalty_spreads_the_choices() -> None:
    """A router that sends every token to one expert, and nothing else to learn."""
    p = Problem(MoLoRA(r=2, num_experts=4, top_k=1))
    p.x[:, 0] = 1  # what all tokens have in common, by which the router prefers one expert
    with torch.no_grad():
        p.adapter.router[2, 0] += 3
    controller = balanced(p, 1.0, 1)
    optimizer = torch.optim.Adam([p.adapter.router], lr=0.05)

    def shares() -> Tensor:
        return F.one_hot((p.x @ p.adapter.router.T).argmax(-1), 4).double().mean(0)

    assert float(shares()[2]) == 1
    for step in range(200):
        optimizer.zero_grad()
        (0 * p.model(p.x).sum()).backward()
        optimizer.step()
        controller.after_update(step, optimizer)
    assert float(shares().max()) < 0.6, f"{ROWS} tokens over 4 experts: {shares().tolist()}"


def test_the_weight_of_a_micro_batch_follows_the_step_also_after_a_restart() -> None:
    p = problem(top_k=1)
    run = Run(p.model, "default", 3, lambda step: 1.0, 0, 0, lambda step: [4, 2, 1][step])
    controller = CONTROLLERS["molora"](balance=1.0).start(run)
    seen = []
    for step in range(3):
        seen.append(float(p.adapter.balance))
        controller.after_update(step, torch.optim.SGD(p.parameters()))
    assert seen == [0.25, 0.5, 1.0]
    tensors, scalars = controller.state()
    assert (tensors, scalars) == ({}, {"step": 3})
    controller.restore({}, {"step": 1})
    assert float(p.adapter.balance) == 0.5


def test_the_controller_comes_with_sparse_routing_only() -> None:
    assert brought(MoLoRA(top_k=2)) == ["molora"]
    assert brought(MoLoRA()) == brought(lk.LoRA()) == []
    stack = lk.METHODS["stack"]([lk.LoRA(r=2), MoLoRA(top_k=1)])
    assert brought(stack) == ["molora"]
    p = Problem(stack)
    assert len(balanced(p).routers) == 1
    with pytest.raises(UsageError, match="nothing to balance"):
        balanced(problem())
    assert "chooses among experts" in CONTROLLERS.module("molora").refuses(MoLoRA())
    with pytest.raises(UsageError, match="balance must not be negative"):
        replace(CONTROLLERS["molora"](), balance=-1.0)
