"""LoRA-FA: the step of the projected gradient (C7), PEFT's optimizer, and what is no longer kept."""

import pytest
import torch
from problem import Problem, Settings, close, mixed
from torch import Tensor, nn

import lorakit as lk
from lorakit.optim import OPTIMIZERS, parameter_groups
from lorakit.optim.lora_fa import projected


@pytest.mark.parametrize("alpha", [1.0, 6.0, 50.0])
def test_c7_a_step_of_descent_is_the_full_gradient_projected_on_the_rows_of_a(alpha: float) -> None:
    p, lr = Problem(lk.LoRA(r=3, alpha=alpha)), 0.1
    A, before = p.A.detach(), p.change
    (p.adapter.delta_weight() * p.G).sum().backward()
    with torch.no_grad():
        p.B -= lr * projected(A, p.B.grad, p.adapter.scale)
    P = A.T @ torch.linalg.inv(A @ A.T) @ A
    close(p.change - before, -lr * p.G @ P, 1e-7)  # the damping of 1e-8
    close(P @ P, P)


def test_the_optimizer_is_adamw_on_that_gradient_and_leaves_a() -> None:
    p = Problem(zero_b=True)
    A = p.A.detach().clone()
    optimizer = p.optimizer("lora_fa", eps=1e-15)
    p.step(optimizer)
    close(p.B.detach(), -1e-2 * projected(A, p.s * p.G @ A.T, p.adapter.scale).sign(), 1e-9)
    assert torch.equal(p.A, A)
    assert not p.A.requires_grad and p.A.grad is None
    assert {name for group in optimizer.param_groups for name in group["param_names"]} == {"0.adapters.default.lora_B"}


def test_it_agrees_with_pefts_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs multiplies under bf16 autocast where there is bf16, at the cost of a hundredth; without, both agree."""
    peft = pytest.importorskip("peft")
    import peft.optimizers.lorafa as theirs_module

    for bf16, tolerance in ((True, 3e-2), (False, 2e-5)):
        monkeypatch.setattr(theirs_module, "is_bf16_available", lambda bf16=bf16: bf16)
        ours = mixed(lk.LoRA(r=2, alpha=8))
        torch.manual_seed(0)
        base = type(ours)()
        config = peft.LoraConfig(
            r=2, lora_alpha=8, target_modules=["one", "two"], modules_to_save=["head", "norm", "conv"]
        )
        theirs = peft.get_peft_model(base, config)
        copy(ours, theirs)
        optimizer = peft.optimizers.create_lorafa_optimizer(theirs, r=2, lora_alpha=8, lr=1e-2)
        optimizer.param_groups[0]["eps"] = 1e-12  # theirs adds it before the bias correction, torch's AdamW after it
        settings = Settings(eps=1e-12)
        own = OPTIMIZERS["lora_fa"](parameter_groups(ours, "default", settings), settings)
        for step in range(4):
            for model, o in ((ours, own), (theirs, optimizer)):
                o.zero_grad()
                (model(torch.arange(10).reshape(2, 5)) - 0.1 * step).square().sum().backward()
                o.step()
        for name in ("one", "two"):
            a = ours.get_parameter(f"{name}.adapters.default.lora_B").detach()
            b = theirs.get_parameter(f"base_model.model.{name}.lora_B.default.weight").detach()
            assert a.abs().max() > 1e-2
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))


@torch.no_grad()
def copy(ours: nn.Module, theirs: nn.Module) -> None:
    """Give PEFT's model our factors; base and head are the same by the seed."""
    for path, _, adapter in lk.adapters(ours):
        if not isinstance(adapter, lk.AbstractAdapter):
            continue
        for factor in ("lora_A", "lora_B"):
            theirs.get_parameter(f"base_model.model.{path}.{factor}.default.weight").copy_(
                adapter.get_parameter(factor)
            )


def test_backward_keeps_a_x_and_not_x() -> None:
    """Two layers in a row: the input of the first needs no gradient, so only what the weights need is saved."""

    def saved(frozen: bool) -> set[tuple[int, ...]]:
        torch.manual_seed(0)
        model = lk.attach(nn.Sequential(nn.Linear(40, 30, bias=False)), lk.LoRA(r=3))
        model[0].adapters["default"].lora_A.requires_grad_(not frozen)
        shapes: set[tuple[int, ...]] = set()

        def pack(t: Tensor) -> Tensor:
            shapes.add(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(7, 40))
        return shapes

    assert (7, 40) in saved(frozen=False)
    assert (7, 40) not in saved(frozen=True)
    assert (7, 3) in saved(frozen=True)
