"""LoHa against its closed forms, PEFT's layers and LyCORIS's modules; and what training with it keeps."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.errors import UsageError

from .problem import IN, OUT, Problem, close, perturb

LoHa = lk.METHODS["loha"]
S = 6 / 2  # the scale of the problems here
NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def problem() -> Problem:
    return Problem(LoHa(r=2, alpha=6.0))


def factors(adapter: nn.Module) -> list[Tensor]:
    return [adapter.get_parameter(name).detach() for name in NAMES]


def test_the_change_is_the_hadamard_product() -> None:
    p = problem()
    perturb(p.adapter)
    w1_a, w1_b, w2_a, w2_b = factors(p.adapter)
    assert [tuple(w.shape) for w in (w1_a, w1_b, w2_a, w2_b)] == [(OUT, 2), (2, IN)] * 2
    close(p.delta, S * (w1_a @ w1_b) * (w2_a @ w2_b))
    for mode in (True, False):
        close(p.model.train(mode)(p.x).detach() - p.base(p.x), p.x @ p.delta.T)


def test_as_many_parameters_as_lora_of_twice_the_rank_and_its_square_as_rank() -> None:
    torch.manual_seed(0)
    loha, lora = (lk.attach(nn.Sequential(nn.Linear(40, 50)).double(), m) for m in (LoHa(r=4), lk.LoRA(r=8)))
    assert lk.summary(loha).trainable == lk.summary(lora).trainable == 2 * 4 * (40 + 50)
    perturb(loha[0].adapters)
    perturb(lora[0].adapters)
    ranks = [int(torch.linalg.matrix_rank(a.delta_weight())) for m in (loha, lora) for _, _, a in lk.adapters(m)]
    assert ranks == [16, 8]


@pytest.mark.parametrize("training", [True, False])
def test_the_first_gradient_and_the_first_step(training: bool) -> None:
    """At the start w2_b alone gets a gradient, that of W weighted by the first product."""
    p = problem()
    p.model.train(training)
    assert torch.equal(p.model(p.x), p.base(p.x))
    p.backward()
    w1_a, w1_b, w2_a, _ = factors(p.adapter)
    weighted = p.gradient() * (w1_a @ w1_b)
    close(p.adapter.hada_w2_b.grad, S * w2_a.T @ weighted)
    assert not any(p.adapter.get_parameter(name).grad.any() for name in NAMES[:3])
    torch.optim.SGD(p.parameters(), lr=1e-2).step()
    close(p.delta, -1e-2 * S**2 * (w1_a @ w1_b) * (w2_a @ w2_a.T @ weighted))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_anywhere(training: bool) -> None:
    p = problem()
    perturb(p.adapter)
    p.model.train(training)
    p.backward()
    w1_a, w1_b, w2_a, w2_b = factors(p.adapter)
    first, second = (S * p.gradient() * (a @ b) for a, b in ((w2_a, w2_b), (w1_a, w1_b)))
    close(p.adapter.hada_w1_a.grad, first @ w1_b.T)
    close(p.adapter.hada_w1_b.grad, w1_a.T @ first)
    close(p.adapter.hada_w2_a.grad, second @ w2_b.T)
    close(p.adapter.hada_w2_b.grad, w2_a.T @ second)


@pytest.mark.parametrize(("r", "cheaper"), [(2, True), (4, True), (5, False)])
def test_in_training_it_is_lora_of_rank_r_squared_where_that_is_less_work(r: int, cheaper: bool) -> None:
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Linear(40, 50)).double(), LoHa(r=r))
    ((_, layer, a),) = lk.adapters(model)
    perturb(a)
    change = a.low_rank(layer)
    assert (change is not None) == cheaper == (r * r * 90 < 40 * 50)
    if change is not None:
        assert change.A.shape == (r * r, 40)
        close((change.scale * change.B @ change.A).detach(), a.delta_weight().detach())


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "linear": (lambda: nn.Linear(120, 100), lambda: torch.randn(3, 120), 4),
    "linear with a high rank": (lambda: nn.Linear(120, 100), lambda: torch.randn(3, 120), 12),
    "conv2d": (lambda: nn.Conv2d(30, 40, 3), lambda: torch.randn(1, 30, 5, 5), 4),
    "embedding": (lambda: nn.Embedding(120, 100), lambda: torch.randint(0, 120, (3,)), 4),
}


def kept(model: nn.Module, x: Tensor) -> int:
    """Numbers in the largest tensor kept for the backward pass that is no parameter."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        model(x)
    return max(t.numel() for t in saved if t.untyped_storage().data_ptr() not in own)


@pytest.mark.parametrize("layer", LAYERS)
def test_training_keeps_no_matrix_of_the_size_of_w(layer: str) -> None:
    make, inputs, r = LAYERS[layer]
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(make()), LoHa(r=r), target_modules=["0"]).train()
    perturb(model[0].adapters)
    assert kept(model, inputs()) < model[0].weight.numel() // 4


def test_what_is_made_again_gives_the_same_gradients() -> None:
    """A convolution, where the matrix is made in both passes, in float64 against plain autograd."""
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Conv2d(3, 4, 3)).double(), LoHa(r=2), target_modules=["0"])
    ((_, layer, a),) = lk.adapters(model)
    perturb(a)
    x = torch.randn(2, 3, 6, 6).double().requires_grad_()
    model(x).square().sum().backward()
    tensors = [x, *a.parameters()]
    grads = [t.grad for t in tensors]
    plain = nn.functional.conv2d(x, layer.weight + a.delta_weight().reshape(layer.weight.shape), layer.bias)
    for mine, theirs in zip(grads, torch.autograd.grad(plain.square().sum(), tensors), strict=True):
        close(mine, theirs, 1e-9)


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_pefts_layer_to_the_last_bit(layer: str) -> None:
    make, inputs, _ = LAYERS[layer]
    torch.manual_seed(0)
    ours, x = nn.Sequential(make()), inputs()
    theirs = nn.Sequential(make())
    theirs.load_state_dict(ours.state_dict())
    lk.attach(ours, LoHa(r=4, alpha=6.0), target_modules=["0"])
    theirs = peft.get_peft_model(theirs, peft.LoHaConfig(r=4, alpha=6, target_modules=["0"]))
    ((_, _, a),) = lk.adapters(ours)
    perturb(a)
    other: Any = theirs.base_model.model[0]
    with torch.no_grad():
        for name in NAMES:
            getattr(other, name)["default"].copy_(a.get_parameter(name))
        assert torch.equal(a.delta_weight().reshape(ours[0].weight.shape), other.get_delta_weight("default"))
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_lycoriss_module(layer: str) -> None:
    loha = pytest.importorskip("lycoris").modules.LohaModule
    make, inputs, _ = LAYERS[layer]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    plain = make()
    plain.load_state_dict(model[0].state_dict())
    lk.attach(model, LoHa(r=4, alpha=6.0), target_modules=["0"])
    ((_, _, a),) = lk.adapters(model)
    perturb(a)
    other = loha("layer", plain, lora_dim=4, alpha=6.0)
    with torch.no_grad():
        for name in NAMES:
            getattr(other, name).copy_(a.get_parameter(name))
        x = inputs()
        torch.testing.assert_close(model.eval()(x), other(x), rtol=1e-5, atol=1e-5)
        assert (model(x) - plain(x)).abs().max() > 0.1


@pytest.mark.parametrize("bad", [{"r": 0}, {"alpha": 0.0}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        LoHa(**bad)
