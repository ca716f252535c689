"""LoRA-XS: its frozen factors are the singular directions of W, only R learns, and a file holds the factors themselves."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.core.errors import UsageError

from .problem import IN, OUT, Problem, close, perturb

LoRAXS = lk.METHODS["lora_xs"]
R = 3


def best(W: Tensor, r: int) -> Tensor:
    """The nearest matrix of rank r."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 20),
    "conv1d_gpt2": lambda: Conv1D(20, 12),
    "embedding": lambda: nn.Embedding(30, 16),
    "conv2d": lambda: nn.Conv2d(3, 8, 3),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_frozen_factors_are_the_largest_singular_directions(layer: str) -> None:
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(LAYERS[layer]()).double(), LoRAXS(r=R), target_modules=["0"])
    ((_, base, a),) = lk.adapters(model)
    A, B, W = a.lora_A.detach(), a.lora_B.detach(), base.matrix()
    close(B.T @ B, torch.eye(R).double())
    close(A @ A.T, torch.diag(torch.linalg.svdvals(W)[:R] ** 2))
    close(B @ A, best(W, R))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.adapters.default.lora_R"}


def test_of_a_4_bit_layer_they_are_those_of_what_is_read() -> None:
    pytest.importorskip("bitsandbytes")
    from lorakit.models.quantize import quantize

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    exact = model[0].weight.detach().clone()
    quantize(model, "nf4")
    lk.attach(model, LoRAXS(r=R))
    ((_, base, a),) = lk.adapters(model)
    torch.testing.assert_close((a.lora_B @ a.lora_A).detach(), best(base.matrix(), R), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base.matrix(), exact, atol=1e-3)


def test_the_start_is_the_base_and_the_first_gradient_is_the_projected_one() -> None:
    p = Problem(LoRAXS(r=R, alpha=7.5))
    assert torch.equal(p.model(p.x), p.base(p.x))
    assert torch.equal(p.model.eval()(p.x), p.base(p.x))
    for mode in (True, False):  # the fused way and the plain one
        p.model.train(mode)
        p.backward()
        U, S, Vh = torch.linalg.svd(p.W, full_matrices=False)
        signs = torch.sign((p.adapter.lora_B.detach() * U[:, :R]).sum(0))
        expected = 2.5 * (U[:, :R] * signs).T @ p.gradient() @ (Vh[:R].T * signs) @ torch.diag(S[:R])
        close(p.adapter.lora_R.grad, expected)
        assert p.adapter.lora_A.grad is None
        assert p.adapter.lora_B.grad is None


def test_the_first_step() -> None:
    p = Problem(LoRAXS(r=R, alpha=7.5)).backward()
    A, B, G = p.adapter.lora_A.detach(), p.adapter.lora_B.detach(), p.gradient()
    torch.optim.SGD(p.parameters(), lr=1e-2).step()
    close(p.delta, -1e-2 * 2.5**2 * B @ B.T @ G @ A.T @ A)


def test_r_squared_numbers_a_layer_whatever_its_size() -> None:
    model = nn.Sequential(nn.Linear(50, 70), nn.Linear(70, 9))
    assert lk.summary(lk.attach(model, LoRAXS(r=4))).trainable == 2 * 16
    wide = lk.attach(nn.Sequential(nn.Linear(500, 700), nn.Linear(700, 90)), LoRAXS(r=4, niter=1))
    assert lk.summary(wide).trainable == 2 * 16


def test_a_small_layer_gets_as_many_directions_as_it_has(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 5))
    base = copy.deepcopy(model)
    lk.attach(model, LoRAXS(r=8))
    assert [len(a.lora_R) for _, _, a in lk.adapters(model)] == [8, 5]
    perturb(model)
    x = torch.randn(3, 20)
    expected = model.eval()(x)
    lk.save(model, tmp_path)
    other = copy.deepcopy(base)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    assert torch.equal(lk.load(other, tmp_path).eval()(x), expected)


def test_a_random_start_and_a_randomized_decomposition() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200))
    with torch.no_grad():  # singular values that fall, as those of trained matrices do
        U, _, Vh = torch.linalg.svd(model[0].weight, full_matrices=False)
        model[0].weight.copy_(U @ torch.diag(0.9 ** torch.arange(200.0)) @ Vh)
    exact, random = (lk.attach(copy.deepcopy(model), LoRAXS(r=20, r_std=1e-3, niter=n)) for n in (0, 10))
    ((_, _, a),), ((_, _, b),) = lk.adapters(exact), lk.adapters(random)
    torch.testing.assert_close(b.lora_B @ b.lora_A, a.lora_B @ a.lora_A, rtol=0, atol=1e-4)
    assert float(a.lora_R.detach().std()) == pytest.approx(1e-3, rel=0.15)


def test_training_keeps_no_input() -> None:
    """A is frozen: what is kept for the backward pass is r numbers a token."""
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Linear(96, 40)), LoRAXS(r=8)).train()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        model(torch.randn(3, 50, 96))
    assert sum(t.numel() for t in saved if t.numel() % 150 == 0) == 150 * 8


def test_the_factors_come_back_from_the_file_and_not_from_w(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20))
    base = copy.deepcopy(model)
    perturb(lk.attach(model, LoRAXS(r=R)).get_submodule("0.adapters"))
    model[0].weight.data.copy_(base[0].weight)
    lk.save(model, tmp_path / "a")
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: pytest.fail("decomposed W again"))
    again = lk.load(base, tmp_path / "a", trainable=True)
    mine, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in mine.items() if "lora_" in key)
    assert {n for n, p in again.named_parameters() if p.requires_grad and "lora_" in n} == {"0.adapters.default.lora_R"}
    x = torch.randn(5, 12)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_the_change_is_what_the_formula_says() -> None:
    p = Problem(LoRAXS(r=R, alpha=7.5))
    perturb(p.adapter)
    a = p.adapter
    assert (a.lora_A.shape, a.lora_B.shape, a.lora_R.shape) == ((R, IN), (OUT, R), (R, R))
    close(p.delta, (2.5 * a.lora_B @ a.lora_R @ a.lora_A).detach())
    for mode in (True, False):
        close(p.model.train(mode)(p.x).detach() - p.base(p.x), p.x @ p.delta.T)


@pytest.mark.parametrize("bad", [{"r": 0}, {"alpha": -1.0}, {"dropout": 1.0}, {"r_std": -0.1}, {"niter": -1}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        LoRAXS(**bad)
