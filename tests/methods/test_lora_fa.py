"""LoRA-FA against its closed forms, and what it keeps for the backward pass."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.optim import OPTIMIZERS, parameter_groups
from lorakit.train.config import OptimConfig

from .problem import Problem, close

R = 4
LoRAFA = lk.METHODS["lora_fa"]


def problem() -> Problem:
    return Problem(LoRAFA(r=R, alpha=6))


def sgd_step(p: Problem, lr: float, gradient: Tensor | None = None) -> None:
    B = p.adapter.lora_B
    p.backward()
    with torch.no_grad():
        B.sub_(lr * (B.grad if gradient is None else gradient))


def test_c3_the_first_step_is_loras() -> None:
    fa, lora = problem(), Problem(lk.LoRA(r=R, alpha=6))
    lora.adapter.load_state_dict(fa.adapter.state_dict())
    for p in (fa, lora):
        p.backward()
        torch.optim.SGD(p.parameters(), lr=1e-3).step()
    assert torch.equal(fa.delta, lora.delta)
    assert fa.delta.any()


def test_c6_all_steps_together_are_a_random_projection_of_the_gradients() -> None:
    p, lr = problem(), 1e-3
    A, s, total = p.adapter.lora_A.clone(), float(p.adapter.scale), torch.zeros_like(p.W)
    for _ in range(20):
        total += p.gradient()
        sgd_step(p, lr)
    close(p.delta, -lr * s**2 * total @ A.T @ A)
    assert torch.equal(p.adapter.lora_A, A)


def test_c7_the_corrected_gradient_is_the_projected_gradient_of_the_weight() -> None:
    p, lr = problem(), 1e-3
    A, s, G = p.adapter.lora_A, float(p.adapter.scale), p.gradient()
    p.backward()
    inverse = torch.linalg.inv(A @ A.T)
    sgd_step(p, lr, p.adapter.lora_B.grad @ inverse / s**2)
    close(p.delta, -lr * G @ A.T @ inverse @ A)


def test_c15_the_best_change_is_the_part_in_the_row_space_of_a() -> None:
    p = problem()
    D = torch.randn_like(p.W)
    A = p.adapter.lora_A
    optimizer = torch.optim.LBFGS(p.parameters(), lr=1, max_iter=200, tolerance_grad=1e-14, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (D - p.adapter.delta_weight()).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    outside = D @ (torch.eye(D.shape[1]) - A.T @ torch.linalg.inv(A @ A.T) @ A)
    close((D - p.delta).square().sum(), outside.square().sum(), 1e-9)


def test_a_is_frozen_and_has_no_optimizer_state() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 5))
    lk.attach(model, LoRAFA(r=4))
    config = OptimConfig()
    optimizer = OPTIMIZERS["adamw"](parameter_groups(model, "default", config), config)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for _ in range(3):
        model(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"0.adapters.default.lora_B", "1.adapters.default.lora_B"}
    assert {id(p) for p in optimizer.state} == {id(p) for n, p in model.named_parameters() if n in moved}


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(96, 40),
    "linear_no_bias": lambda: nn.Linear(96, 40, bias=False),
    "conv1d_gpt2": lambda: Conv1D(40, 96),
}


def kept(method: lk.Method, make: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[bool, int]:
    """Whether the input is kept for the backward pass, and how many numbers a token that is not a parameter are."""
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(make()).to(dtype), method, target_modules=["0"])
    x = torch.randn(3, 50, 96, dtype=dtype, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        model(x)
    activations = {t.untyped_storage().data_ptr(): t.numel() for t in saved if t.numel() % 150 == 0}
    return x.untyped_storage().data_ptr() in activations, sum(activations.values()) // 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_input_is_not_kept_for_the_backward_pass(layer: str, dtype: torch.dtype) -> None:
    assert kept(LoRAFA(r=R), LAYERS[layer], dtype) == (False, R)
    assert kept(lk.LoRA(r=R), LAYERS[layer], dtype) == (True, 96 + R), "else this test shows nothing"


def test_an_init_that_starts_a_at_zero_is_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 20))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="init_b"):
        lk.attach(model, LoRAFA(init="init_b"))
    assert lk.names(model) == []
    assert model.state_dict().keys() == before.keys()


def test_embeddings_start_where_they_can_learn() -> None:
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Embedding(3000, 16)), LoRAFA(r=8), target_modules=["0"])
    ((_, _, adapter),) = lk.adapters(model)
    assert float(adapter.lora_A.square().sum(0).mean()) == pytest.approx(1.0, rel=0.05)
    assert not adapter.lora_B.any()
    model(torch.tensor([1, 5, 5])).square().sum().backward()
    assert adapter.lora_B.grad.any()


def test_a_start_from_the_weight_is_taken_off_again_and_saved_as_one_pair(tmp_path: Path) -> None:
    """With PiSSA the frozen A holds the principal directions of W; the start is the base model all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20)).eval()
    plain, x = copy.deepcopy(model), torch.randn(5, 12)
    lk.attach(model, LoRAFA(r=3, init="pissa"))
    assert torch.equal(model(x), plain(x))
    ((_, _, chain),) = lk.adapters(model)
    _, _, V = torch.linalg.svd(plain[0].weight)
    inside = chain.live.lora_A @ V[:3].T @ V[:3]
    torch.testing.assert_close(chain.live.lora_A.detach(), inside.detach())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.adapters.default.live.lora_B"}
    with torch.no_grad():
        chain.live.lora_B.add_(0.1)
    lk.save(model, tmp_path)
    torch.testing.assert_close(lk.load(plain, tmp_path)(x), model(x))
