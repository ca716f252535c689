"""Riemannian preconditioning: its closed form, its invariance, PEFT's optimizer."""

import pytest
import torch
from problem import Problem, Settings, advance, close, mixed
from torch import nn

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.optim import OPTIMIZERS, parameter_groups
from lorakit.optim.riemannian import Options, scaled


def test_the_change_does_not_depend_on_how_the_product_is_split() -> None:
    """(A, B) and (T A, B T^-1) are the same layer; a small step of plain descent moves both alike, unlike without."""
    p = Problem()
    A, B, G = p.A.detach(), p.B.detach(), p.G
    T = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 0.3], [0.1, 0.0, 3.0]]).double()

    def first_order(A: torch.Tensor, B: torch.Tensor, reg: float | None) -> torch.Tensor:
        g_A, g_B = B.T @ G, G @ A.T
        if reg is not None:
            a, b = scaled(A, B, g_A, g_B, reg)
            assert a is not None and b is not None
            g_A, g_B = a, b
        return B @ g_A + g_B @ A

    close(first_order(A, B, 1e-14), first_order(T @ A, B @ torch.linalg.inv(T), 1e-14), 1e-9)
    plain = first_order(A, B, None) - first_order(T @ A, B @ torch.linalg.inv(T), None)
    assert plain.norm() > 0.1


def test_closed_form() -> None:
    p, reg = Problem(), 0.3
    a, b = scaled(p.A.detach(), p.B.detach(), p.s * p.B.detach().T @ p.G, p.s * p.G @ p.A.detach().T, reg)
    A, B, eye = p.A.detach(), p.B.detach(), torch.eye(3).double()
    close(a, torch.linalg.inv(B.T @ B + reg * eye) @ (p.s * B.T @ p.G))
    close(b, (p.s * p.G @ A.T) @ torch.linalg.inv(A @ A.T + reg * eye))


@pytest.mark.parametrize("reg", [1e-2, 1.0])
def test_it_agrees_with_pefts_optimizer(reg: float) -> None:
    peft = pytest.importorskip("peft")
    riemannian = pytest.importorskip("peft.optimizers").create_riemannian_optimizer
    ours = mixed(lk.LoRA(r=2, alpha=8))
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["one", "two"], modules_to_save=["head", "norm", "conv"])
    theirs = peft.get_peft_model(type(ours)(), config)
    with torch.no_grad():
        for name in ("one", "two"):
            for factor in ("lora_A", "lora_B"):
                own = ours.get_parameter(f"{name}.adapters.default.{factor}")
                theirs.get_parameter(f"base_model.model.{name}.{factor}.default.weight").copy_(own)
    settings = Settings(weight_decay=0.0, options={"reg": reg})
    advance(ours, OPTIMIZERS["riemannian"](parameter_groups(ours, "default", settings), settings), 0, 5)
    advance(theirs, riemannian(theirs, torch.optim.AdamW, lr=1e-2, reg=reg, weight_decay=0.0), 0, 5)
    for name in ("one", "two"):
        for factor in ("lora_A", "lora_B"):
            own = ours.get_parameter(f"{name}.adapters.default.{factor}")
            other = theirs.get_parameter(f"base_model.model.{name}.{factor}.default.weight")
            torch.testing.assert_close(own, other, rtol=1e-4, atol=2e-6)
            assert own.detach().abs().max() > 1e-2


def test_damping_is_needed() -> None:
    with pytest.raises(UsageError, match="greater than 0"):
        Options(reg=0.0)


def test_factors_of_a_normalised_method_are_scaled_too() -> None:
    """DoRA's change is not s B A, but its factors are a pair: steps by them make sense all the same."""
    model = lk.attach(nn.Sequential(nn.Linear(6, 5)), lk.METHODS["dora"](r=2))
    settings = Settings()
    optimizer = OPTIMIZERS["riemannian"](parameter_groups(model, "default", settings), settings)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
