"""LoKr against the Kronecker product itself, PEFT's layers and LyCORIS's modules; and that it is never made for a linear layer."""

import importlib
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization as pefts_factorization
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.core.errors import UsageError

from .problem import Problem, close, perturb
from .test_dora import NothingAsLargeAs

LoKr = lk.METHODS["lokr"]
factorization = lk.METHODS.module("lokr").factorization


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 8, 12, 16, 1000])
def test_the_factorization_is_pefts(factor: int) -> None:
    for dimension in [*range(1, 400), 576, 768, 1024, 1536, 4096, 11008, 49152, 65537]:
        m, n = factorization(dimension, factor)
        assert m * n == dimension
        assert (m, n) == pefts_factorization(dimension, factor), dimension


def square(**settings: Any) -> Problem:
    """W is (7, 11), both prime: take the scale apart from the shapes."""
    return Problem(LoKr(**{"r": 2, "alpha": 6.0, **settings}))


def layer(r: int, both: bool, out: int = 24, inputs: int = 60, factor: int = -1) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    method = LoKr(r=r, alpha=2.0 * r, decompose_both=both, decompose_factor=factor)
    model = lk.attach(nn.Sequential(nn.Linear(inputs, out)).double(), method)
    ((_, _, adapter),) = lk.adapters(model)
    perturb(adapter)
    return model, adapter


# (r, both) -> names of the parameters, for out = 24 = 4 * 6 and in = 60 = 6 * 10
FORMS: dict[tuple[int, bool], set[str]] = {
    (1, True): {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
    (1, False): {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    (4, True): {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    (5, False): {"lokr_w1", "lokr_w2"},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("r", "both"), FORMS)
def test_the_change_is_the_kronecker_product_and_the_forward_is_its(r: int, both: bool, training: bool) -> None:
    model, a = layer(r, both)
    own = {name: p.detach() for name, p in a.named_parameters()}
    assert own.keys() == FORMS[r, both]
    w1 = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    w2 = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
    assert (w1.shape, w2.shape) == ((4, 6), (6, 10))
    dense = 2.0 * torch.stack([torch.cat([w1[i, j] * w2 for j in range(6)], 1) for i in range(4)]).flatten(0, 1)
    close(a.delta_weight().detach(), dense)
    x = torch.randn(2, 3, 60).double()
    frozen = nn.functional.linear(x, model[0].weight, model[0].bias)
    close((model.train(training)(x) - frozen).detach(), x @ dense.T)


def test_the_rank_is_the_product_of_the_ranks() -> None:
    """Of 24 + 15 numbers a change of rank 8, of 24 + 60 one of full rank; LoRA's rank 1 has 84."""
    _, low = layer(2, False)
    _, whole = layer(5, False)
    ranks = [int(torch.linalg.matrix_rank(a.delta_weight())) for a in (low, whole)]
    assert ranks == [4 * 2, 24]
    assert [sum(p.numel() for p in a.parameters()) for a in (low, whole)] == [24 + 2 * 16, 24 + 60]


@pytest.mark.parametrize("r", [2, 5])
def test_the_first_gradient_and_the_first_step(r: int) -> None:
    """At the start w2 alone, or w2_b, gets a gradient: the sum of G's blocks weighted by w1."""
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Linear(60, 24, bias=False)).double(), LoKr(r=r, alpha=2.0 * r))
    x, y = torch.randn(30, 60).double(), torch.randn(30, 24).double()
    W = model[0].weight.detach()
    assert torch.equal(model(x), x @ W.T)
    ((_, _, a),) = lk.adapters(model)
    (0.5 * (model(x) - y).square().sum()).backward()
    G = (x @ W.T - y).T @ x
    blocks = G.reshape(4, 6, 6, 10).permute(0, 2, 1, 3)  # [i, j] is the block (6, 10) that w1[i, j] scales
    summed = 2.0 * torch.einsum("ij,ijcd->cd", a.w1().detach(), blocks)
    moves = summed
    if r == 2:
        close(a.lokr_w2_b.grad, a.lokr_w2_a.detach().T @ summed)
        assert not a.lokr_w2_a.grad.any()
        moves = (a.lokr_w2_a @ a.lokr_w2_a.T).detach() @ summed
    else:
        close(a.lokr_w2.grad, summed)
    assert not a.lokr_w1.grad.any()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    close(a.delta_weight().detach(), -1e-2 * 2.0 * torch.kron(a.w1().detach(), moves))


MAKE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(120, 100), lambda: torch.randn(3, 120)),
    "conv1d_gpt2": (lambda: Conv1D(100, 120), lambda: torch.randn(3, 120)),
    "embedding": (lambda: nn.Embedding(120, 100), lambda: torch.randint(0, 120, (3,))),
    "conv2d": (lambda: nn.Conv2d(12, 20, 3), lambda: torch.randn(1, 12, 6, 6)),
}


@pytest.mark.parametrize("r", [2, 60])
@pytest.mark.parametrize("kind", ["linear", "conv1d_gpt2", "embedding"])
def test_the_product_is_not_made(kind: str, r: int) -> None:
    make, inputs = MAKE[kind]
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(make()), LoKr(r=r), target_modules=["0"]).train()
    perturb(model[0].adapters)
    x = inputs()
    with NothingAsLargeAs(model[0].weight.numel() // 4, [*model.parameters(), *model.buffers()]) as watch:
        model(x).square().sum().backward()
    assert watch.largest > 100, "it must have seen something"


@pytest.mark.parametrize("kind", MAKE)
def test_every_kind_against_the_dense_form(kind: str) -> None:
    make, inputs = MAKE[kind]
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(make()).double(), LoKr(r=2), target_modules=["0"])
    perturb(model[0].adapters)
    x = inputs()
    x = x.double().requires_grad_() if x.is_floating_point() else x
    y = model(x)
    y.square().sum().backward()
    ((_, base, a),) = lk.adapters(model)
    dense = base.frozen(x) + base.project(x, a.delta_weight())
    close(y.detach(), dense.detach())
    own = list(a.parameters())
    for p, grad in zip(own, torch.autograd.grad(dense.square().sum(), own), strict=True):
        close(p.grad, grad, 1e-9)


PEFTS = [("linear", 2, True, -1), ("linear", 2, False, 4), ("linear", 60, False, -1), ("conv2d", 1, True, -1)]


@pytest.mark.parametrize(("kind", "r", "both", "factor"), [*PEFTS, ("conv2d", 8, False, -1)])
def test_pefts_layer(kind: str, r: int, both: bool, factor: int) -> None:
    """The same parameters in the same shapes, the same matrix to the last bit, and the same output."""
    make, inputs = MAKE[kind]
    torch.manual_seed(0)
    ours, x = nn.Sequential(make()), inputs()
    theirs = nn.Sequential(make())
    theirs.load_state_dict(ours.state_dict())
    settings = {"r": r, "alpha": 6, "decompose_both": both, "decompose_factor": factor}
    lk.attach(ours, LoKr(**{**settings, "alpha": 6.0}), target_modules=["0"])
    theirs = peft.get_peft_model(theirs, peft.LoKrConfig(**settings, target_modules=["0"]))
    ((_, _, a),) = lk.adapters(ours)
    perturb(a)
    other: Any = theirs.base_model.model[0]
    with torch.no_grad():
        for name, p in a.named_parameters():
            their = getattr(other, name)["default"]
            their.copy_(p.reshape(their.shape))
        assert sum(p.numel() for p in a.parameters()) == theirs.get_nb_trainable_parameters()[0]
        assert torch.equal(a.delta_weight().reshape(ours[0].weight.shape), other.get_delta_weight("default"))
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "r", "both", "factor"), [form for form in PEFTS if form[1] < 60])
def test_lycoriss_module(kind: str, r: int, both: bool, factor: int) -> None:
    pytest.importorskip("lycoris")
    lokr = importlib.import_module("lycoris.modules.lokr").LokrModule
    make, inputs = MAKE[kind]
    torch.manual_seed(0)
    model, plain = nn.Sequential(make()), make()
    plain.load_state_dict(model[0].state_dict())
    method = LoKr(r=r, alpha=6.0, decompose_both=both, decompose_factor=factor)
    lk.attach(model, method, target_modules=["0"])
    ((_, _, a),) = lk.adapters(model)
    perturb(a)
    other = lokr("layer", plain, lora_dim=r, alpha=6.0, decompose_both=both, factor=factor)
    with torch.no_grad():
        for name, p in a.named_parameters():
            getattr(other, name).copy_(p)
        x = inputs()
        torch.testing.assert_close(model.eval()(x), other(x), rtol=1e-5, atol=1e-5)
        assert (model(x) - plain(x)).abs().max() > 0.1


def test_prime_sides_leave_one_matrix() -> None:
    p = square(r=6)
    perturb(p.adapter)
    assert {n: tuple(t.shape) for n, t in p.adapter.named_parameters()} == {"lokr_w1": (1, 1), "lokr_w2": (7, 11)}
    close(p.delta, (p.adapter.lokr_w1 * p.adapter.lokr_w2).detach())


@pytest.mark.parametrize("bad", [{"r": 0}, {"alpha": 0.0}, {"decompose_factor": 0}, {"decompose_factor": -2}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        LoKr(**bad)


def test_a_rank_above_every_side_is_refused() -> None:
    with pytest.raises(UsageError, match="r is 13"):
        lk.attach(nn.Sequential(nn.Linear(12, 8)), LoKr(r=13))
