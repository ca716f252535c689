"""Muon on factors: Newton-Schulz against the SVD and torch's own, and who is moved by what."""

import math

import pytest
import torch
from problem import Problem, Settings, advance, close, mixed
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.optim import OPTIMIZERS, parameter_groups
from lorakit.optim.muon import Options, orthogonal


@pytest.mark.parametrize("shape", [(8, 96), (96, 8), (16, 16)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_vectors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -1.5, min(shape))
    O = orthogonal(U @ torch.diag(values) @ Vh)  # noqa: E741
    assert O.shape == shape
    inner = U.T @ O @ Vh.T
    assert 0.65 < inner.diagonal().min() <= inner.diagonal().max() < 1.25
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-3
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_the_first_update_has_its_singular_values_in_a_band() -> None:
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Linear(48, 40, bias=False)), lk.LoRA(r=8))
    settings = Settings(lr=1e-2)
    optimizer = OPTIMIZERS["muon"](parameter_groups(model, "default", settings), settings)
    A, B = (p for n, p in sorted(model.named_parameters()) if "lora_" in n)
    before = A.detach().clone()
    model(torch.randn(64, 48)).sub(torch.randn(64, 40)).square().sum().backward()
    optimizer.step()
    values = torch.linalg.svdvals(B.detach() / (1e-2 * 0.2 * math.sqrt(40)))
    assert 0.65 < values.min() <= values.max() < 1.25
    assert torch.equal(A, before)  # its gradient is zero while B is


@pytest.mark.parametrize("nesterov", [True, False])
def test_it_agrees_with_torchs_muon(nesterov: bool) -> None:
    """Theirs iterates in bf16, which moves singular values by a few hundredths but no more."""
    p, q = Problem(dtype=torch.float32), Problem(dtype=torch.float32)
    ours = p.optimizer("muon", weight_decay=0.1, options={"nesterov": nesterov})
    theirs = torch.optim.Muon(
        [q.A, q.B], lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    start = p.B.detach().clone()
    for step in range(5):
        for problem, optimizer in ((p, ours), (q, theirs)):
            problem.step(optimizer, problem.G * (1 + step))
    moved = (p.B - start).norm()
    assert moved > 1e-2
    assert (p.B - q.B).norm() < 0.03 * moved
    assert (p.A - q.A).norm() < 0.03 * moved


def test_what_is_no_factor_is_trained_by_adamw() -> None:
    model, other = mixed(), mixed()
    settings = Settings(weight_decay=0.1)
    muon = OPTIMIZERS["muon"](parameter_groups(model, "default", settings), settings)
    groups = parameter_groups(other, "default", settings)
    rest = torch.optim.AdamW([g for g in groups if g["role"] not in ("A", "B")], betas=(0.9, 0.999), eps=1e-8)
    for step in range(4):
        advance(model, muon, step, step + 1)
        for name, p in model.named_parameters():
            q = other.get_parameter(name)
            if "lora_" in name:
                q.data.copy_(p)
            elif p.grad is not None:
                q.grad = p.grad.clone()
        rest.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, other.get_parameter(name), rtol=1e-5, atol=1e-7)


def test_momentum_is_the_mean_of_the_gradients() -> None:
    p = Problem()
    optimizer = p.optimizer("muon", lr=0.0, options={"momentum": 0.5})
    seen: list[Tensor] = []
    for step in range(3):
        p.step(optimizer, p.G * (step + 1))
        seen.append(p.B.grad.clone())
    close(optimizer.state[p.B]["exp_avg"], 0.125 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2])


def test_options_that_make_no_sense_are_refused() -> None:
    for wrong in ({"momentum": 1.0}, {"steps": 0}):
        with pytest.raises(UsageError):
            Options(**wrong)  # ty: ignore[invalid-argument-type]
