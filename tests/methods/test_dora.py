"""DoRA against its closed forms, against PEFT's layers, and for what its forward pass allocates."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.core.registry import INITS

from .allocations import NothingAsLargeAs
from .problem import Problem, close, perturb

DoRA = lk.METHODS["dora"]


def problem(**kwargs: Any) -> Problem:
    p = Problem(DoRA(**{"r": 4, "alpha": 6, **kwargs}))
    perturb(p.adapter)
    return p


def direction(p: Problem) -> Tensor:
    """V, of which W' has the rows' directions."""
    return p.W + (p.adapter.scale * p.adapter.lora_B @ p.adapter.lora_A).detach()


def test_the_rows_have_the_length_m_and_the_direction_v() -> None:
    p = problem()
    V = direction(p)
    close(p.merged.norm(dim=1), p.adapter.magnitude.detach().abs())
    close(p.merged, torch.diag(p.adapter.magnitude.detach() / V.norm(dim=1)) @ V)
    close(p.model(p.x).detach(), p.x @ p.merged.T + p.layer.bias.detach())


def test_the_start_is_the_base_and_the_magnitudes_are_its_norms() -> None:
    p = Problem(DoRA(r=4))
    close(p.adapter.magnitude.detach(), p.W.norm(dim=1))
    assert torch.equal(p.model(p.x), p.base(p.x))


def test_c11_gradients_with_the_norm_as_a_constant() -> None:
    p = problem().backward()
    A, B, m, s = p.adapter.lora_A, p.adapter.lora_B, p.adapter.magnitude, p.adapter.scale
    G, V = p.gradient(), direction(p)
    norm = V.norm(dim=1)
    close(m.grad, (G * V).sum(1) / norm)
    scaled = torch.diag(m.detach() / norm) @ G
    close(B.grad, s * scaled @ A.detach().T)
    close(A.grad, s * B.detach().T @ scaled)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_the_factored_norm_is_the_norm(dtype: torch.dtype, tolerance: float, size: float) -> None:
    """From changes much smaller to changes much larger than W."""
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Linear(300, 200)).to(dtype), DoRA(r=8))
    ((_, layer, adapter),) = lk.adapters(model)
    with torch.no_grad():
        adapter.lora_B.normal_(std=size)
    V = layer.weight + adapter.scale * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(adapter.norm(layer.weight), V.detach().norm(dim=1), rtol=10 * tolerance, atol=0)


def test_the_norm_in_bf16_is_better_than_bf16() -> None:
    """Only the product of A and W is rounded to it, so that a small change is not lost beside a large W."""
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Linear(300, 200)).bfloat16(), DoRA(r=8))
    ((_, layer, adapter),) = lk.adapters(model)
    with torch.no_grad():
        adapter.lora_B.normal_(std=0.02)
    V = layer.weight.double() + (adapter.scale * adapter.lora_B @ adapter.lora_A).double()
    error = (adapter.norm(layer.weight).double() / V.detach().norm(dim=1) - 1).abs().max()
    assert error < 2**-11


def test_a_row_of_zeros_stays_zero() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        linear.weight[1] = 0
    model = lk.attach(nn.Sequential(linear), DoRA(r=2))
    x = torch.randn(5, 6)
    model(x).square().sum().backward()
    ((_, _, adapter),) = lk.adapters(model)
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    assert not model(x)[:, 1].any()
    with torch.no_grad():
        adapter.lora_B.add_(1.0)
    assert model(x).isfinite().all()


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(120, 100), lambda: torch.randn(3, 120)),
    "conv1d_gpt2": (lambda: Conv1D(100, 120), lambda: torch.randn(3, 120)),
    "embedding": (lambda: nn.Embedding(120, 100), lambda: torch.randint(0, 120, (3,))),
    "conv2d": (lambda: nn.Conv2d(30, 40, 3), lambda: torch.randn(1, 30, 5, 5)),
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_no_matrix_of_the_size_of_w_is_made(
    layer: str, dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lk.METHODS.module("dora"), "AT_ONCE", 1000)
    make, inputs = LAYERS[layer]
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(make()).to(dtype), DoRA(r=4, dropout=dropout), target_modules=["0"])
    perturb(next(iter(lk.adapters(model)))[2])
    x = inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    with NothingAsLargeAs(model[0].weight.numel(), [*model.parameters(), *model.buffers()]) as watch:
        model(x).float().square().sum().backward()
    assert watch.largest > 100, "it must have seen something"


def test_the_watch_above_can_fail() -> None:
    W, B, A = torch.randn(100, 120), torch.randn(100, 4), torch.randn(4, 120)
    with pytest.raises(AssertionError, match="made"), NothingAsLargeAs(W.numel(), [W]):
        (W + B @ A).norm(dim=1)


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_dropout_is_pefts(layer: str) -> None:
    """The same random numbers, in training: y = W x + (g - 1) W x̃ + g s B A x̃."""
    make, inputs = LAYERS[layer]
    torch.manual_seed(0)
    ours, x = nn.Sequential(make()), inputs()
    theirs = nn.Sequential(make())
    theirs.load_state_dict(ours.state_dict())
    lk.attach(ours, DoRA(r=4, alpha=8, dropout=0.4), target_modules=["0"])
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.4, use_dora=True, target_modules=["0"])
    theirs = peft.get_peft_model(theirs, config)
    ((_, _, adapter),) = lk.adapters(ours)
    perturb(adapter)
    other = theirs.base_model.model[0]
    with torch.no_grad():
        for mine, their in (
            (adapter.lora_A, other.lora_A["default"].weight),
            (adapter.lora_B, other.lora_B["default"].weight),
            (adapter.magnitude, other.lora_magnitude_vector["default"].weight),
        ):
            their.copy_(mine.reshape(their.shape))
    outputs = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], ours.eval()(x), atol=1e-2)


@pytest.mark.parametrize("init", sorted(INITS))
def test_inits_from_factors_of_w_are_refused(init: str) -> None:
    if vars(INITS.module(init)).get("FROM_BASE"):
        with pytest.raises(UsageError, match=init):
            DoRA(init=init)
    else:
        assert DoRA(init=init).init == init
