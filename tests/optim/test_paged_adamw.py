"""bitsandbytes' AdamW behind `optim.name: paged_adamw`: torch's updates, exact checkpoints, refused where nothing can page."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.optim import OPTIMIZERS, parameter_groups
from lorakit.optim.paged_adamw import make
from lorakit.train.checkpoint import optimizer_tensors, restore_optimizer

bnb = pytest.importorskip("bitsandbytes")


@dataclass(frozen=True)
class Settings:
    lr: float = 1e-2
    b_ratio: float = 4.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8


def net(device: str) -> nn.Module:
    torch.manual_seed(0)
    return lk.attach(nn.Sequential(nn.Linear(80, 70), nn.Linear(70, 3)).to(device), lk.LoRA(r=4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    device = next(model.parameters()).device
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(16, 80, generator=torch.Generator().manual_seed(step)).to(device)
        model(x).square().mean().backward()
        optimizer.step()


Build = Callable[[list[dict]], torch.optim.Optimizer]


def same_as_torch(build: Build, device: str) -> None:
    """The same parameters after some steps, also where they stop and go on from a checkpoint's tensors."""
    ours, reference, resumed = net(device), net(device), net(device)
    settings = Settings()
    optimizer = build(parameter_groups(ours, "default", settings))
    train(reference, OPTIMIZERS["adamw"](parameter_groups(reference, "default", settings), settings), range(6))
    train(ours, optimizer, range(3))
    tensors, scalars = optimizer_tensors(optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed.load_state_dict(ours.state_dict())
    again = build(parameter_groups(resumed, "default", settings))
    restore_optimizer(again, tensors, scalars)
    train(ours, optimizer, range(3, 6))
    train(resumed, again, range(3, 6))
    for (name, a), b, c in zip(ours.named_parameters(), reference.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(a, c), name
    assert (next(lk.adapters(ours))[2].lora_B.abs() > 1e-3).any()


def test_the_unpaged_one_makes_the_updates_of_torch() -> None:
    same_as_torch(lambda groups: make(bnb.optim.AdamW32bit, groups, Settings()), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_paged_one_makes_the_updates_of_torch() -> None:
    same_as_torch(lambda groups: OPTIMIZERS["paged_adamw"](groups, Settings()), "cuda")


def test_on_a_processor_it_is_refused_with_the_reason() -> None:
    groups = parameter_groups(net("cpu"), "default", Settings())
    with pytest.raises(lk.LorakitError, match="needs an NVIDIA GPU") as raised:
        OPTIMIZERS["paged_adamw"](groups, Settings())
    assert "paged" in (raised.value.why or "")
    assert "adamw" in (raised.value.fix or "")
