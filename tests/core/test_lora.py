"""LoRA against its closed forms, in float64. W = W0 + s B A, y = x W^T, G = dL/dW (out, in)."""

import math

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk

OUT, IN, R = 7, 11, 4


class Problem:
    """Least squares on one layer: L = 1/2 ||x W^T - y||^2, so G = (x W^T - y)^T x."""

    def __init__(self, **kwargs: object) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(IN, OUT, bias=False)).double()
        self.x, self.y = torch.randn(23, IN).double(), torch.randn(23, OUT).double()
        self.W0 = self.model[0].weight.detach().clone()
        lk.attach(self.model, lk.LoRA(**{"r": R, "alpha": 6, **kwargs}))
        ((_, self.layer, self.adapter),) = lk.adapters(self.model)
        self.s = float(self.adapter.scale)

    @property
    def delta(self) -> Tensor:
        return self.adapter.delta_weight().detach()

    def gradient(self) -> Tensor:
        return ((self.x @ (self.W0 + self.delta).T - self.y).T @ self.x).detach()

    def backward(self) -> None:
        self.model.zero_grad()
        (0.5 * (self.model(self.x) - self.y).square().sum()).backward()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("stabilized", [False, True])
def test_scale(stabilized: bool) -> None:
    p = Problem(rank_stabilized=stabilized)
    assert math.isclose(p.s, 6 / (math.sqrt(R) if stabilized else R), rel_tol=1e-6)
    nn.init.normal_(p.adapter.lora_B)
    close(p.delta, p.adapter.scale * p.adapter.lora_B @ p.adapter.lora_A)


def test_alpha_is_twice_the_rank_when_absent() -> None:
    assert float(Problem(alpha=None).adapter.scale) == 2.0


def test_c1_gradients_are_the_projected_gradient_of_the_weight() -> None:
    p = Problem()
    nn.init.normal_(p.adapter.lora_B)
    G, A, B = p.gradient(), p.adapter.lora_A, p.adapter.lora_B
    p.backward()
    close(B.grad, p.s * G @ A.detach().T)
    close(A.grad, p.s * B.detach().T @ G)


def test_c2_nothing_changes_at_the_start_and_a_has_no_gradient() -> None:
    p = Problem()
    assert torch.equal(p.model(p.x), p.x @ p.W0.T)
    p.backward()
    assert torch.count_nonzero(p.adapter.lora_A.grad) == 0


def test_c3_the_first_step_of_gradient_descent() -> None:
    p, lr = Problem(), 1e-3
    G, A = p.gradient(), p.adapter.lora_A.detach().clone()
    p.backward()
    torch.optim.SGD(p.adapter.parameters(), lr=lr).step()
    close(p.delta, -lr * p.s**2 * G @ A.T @ A)
    assert torch.equal(p.adapter.lora_A, A)


def test_c4_init_b_is_the_mirror_image() -> None:
    p, lr = Problem(init="init_b"), 1e-3
    G, B = p.gradient(), p.adapter.lora_B.detach().clone()
    assert torch.count_nonzero(p.delta) == 0
    assert torch.count_nonzero(B) > 0
    p.backward()
    assert torch.count_nonzero(p.adapter.lora_B.grad) == 0
    torch.optim.SGD(p.adapter.parameters(), lr=lr).step()
    close(p.delta, -lr * p.s**2 * B @ B.T @ G)


def test_c5_the_first_step_of_adam_is_the_sign() -> None:
    p, lr = Problem(), 1e-3
    G, A = p.gradient(), p.adapter.lora_A.detach().clone()
    p.backward()
    torch.optim.Adam(p.adapter.parameters(), lr=lr, eps=1e-12).step()
    torch.testing.assert_close(p.adapter.lora_B.detach(), -lr * torch.sign(G @ A.T), rtol=1e-7, atol=0)
    assert torch.equal(p.adapter.lora_A, A)


def test_dropout_is_on_the_branch_only_and_off_in_evaluation() -> None:
    p = Problem(dropout=0.5)
    nn.init.normal_(p.adapter.lora_B)
    p.model.eval()
    close(p.model(p.x), p.x @ (p.W0 + p.delta).T)
    p.model.train()
    torch.manual_seed(3)
    branch = p.model(p.x) - p.x @ p.W0.T
    torch.manual_seed(3)
    kept = nn.functional.dropout(p.x, 0.5)
    close(branch, kept @ p.delta.T)


@pytest.mark.parametrize(
    ("init", "factor", "std"),
    [
        ("kaiming", "lora_A", (1 / 3 / 4000) ** 0.5),
        ("kaiming_normal", "lora_A", (1 / 4000) ** 0.5),
        ("gaussian", "lora_A", 1 / 64),
        ("xavier", "lora_A", (2 / (4000 + 64)) ** 0.5),
        ("orthogonal", "lora_A", (1 / 4000) ** 0.5),
        ("init_b", "lora_B", (1 / 64) ** 0.5),
    ],
)
def test_inits_have_the_spread_they_claim_and_change_nothing(init: str, factor: str, std: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4000, 3000))
    lk.attach(model, lk.LoRA(r=64, init=init))
    ((_, _, adapter),) = lk.adapters(model)
    adapter.requires_grad_(False)
    random, zero = (
        adapter.get_parameter(factor),
        adapter.get_parameter({"lora_A": "lora_B", "lora_B": "lora_A"}[factor]),
    )
    assert math.isclose(float(random.std()), std, rel_tol=0.02)
    assert abs(float(random.mean())) < 4 * std / random.numel() ** 0.5
    assert torch.count_nonzero(zero) == 0
    if init == "orthogonal":
        torch.testing.assert_close(random @ random.T, torch.eye(64), atol=1e-5, rtol=0)
    if init == "kaiming":
        assert float(random.abs().max()) <= 4000**-0.5


def test_every_init_file_is_covered_above() -> None:
    """The others look at the weight or at data: tests/init."""
    looks = {name for name in lk.INITS if {"FROM_BASE", "NEEDS"} & vars(lk.INITS.module(name)).keys()}
    assert set(lk.INITS) - looks == {"kaiming", "kaiming_normal", "gaussian", "xavier", "orthogonal", "init_b"}


@pytest.mark.parametrize("bad", [{"r": 0}, {"dropout": 1.0}, {"alpha": float("nan")}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(lk.LorakitError, match=next(iter(bad))):
        lk.LoRA(**bad)


def test_two_adapters_train_a_copy_each_of_a_module_in_full() -> None:
    """The second copies the module, not what the first one has put on it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, OUT)).double()
    x = torch.randn(3, IN).double()
    base = model(x)
    for name in ("one", "two"):
        lk.attach(model, lk.LoRA(r=2), target_modules=["0"], modules_to_save=["1"], name=name)
        assert torch.equal(model(x), base)
        model(x).sum().backward()
        with torch.no_grad():
            model[1].adapters[name].copy.weight.add_(1.0)
    assert sorted(name for name, _ in model[1].adapters.named_parameters()) == [
        f"{name}.copy.{leaf}" for name in ("one", "two") for leaf in ("bias", "weight")
    ]
    assert type(model[1].adapters["two"].copy) is nn.Linear
    assert model[1].adapters["two"].copy.weight.grad is not None
