"""Every method learns: a change of the layers that it can make is found, and what was frozen stays as it was."""

import copy

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core.start import needs
from lorakit.core.statistics import Statistics
from lorakit.optim import OPTIMIZERS, parameter_groups
from lorakit.train.config import OptimConfig


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))


def known(model: nn.Module) -> dict[str, Statistics]:
    """Two adapters of rank 16 for each layer, which a mixture is made of."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    shapes = {path: ((2, 16, m.in_features), (2, m.out_features, 16)) for path, m in layers.items()}
    return {path: Statistics(experts=(torch.randn(a) / 4, torch.randn(b) / 4)) for path, (a, b) in shapes.items()}


@pytest.mark.parametrize("name", sorted(lk.METHODS))
def test_the_loss_falls(name: str) -> None:
    """The teacher is the same network with the same adapter, moved at random from its start."""
    torch.manual_seed(0)
    model = network()
    before = copy.deepcopy(model.state_dict())
    method = lk.METHODS[name]()
    lk.attach(model, method, statistics=known(model) if "experts" in needs(method) else None)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(64, 12)
    y = teacher(x).detach()
    config = OptimConfig(lr=1e-2)
    optimizer = OPTIMIZERS["adamw"](parameter_groups(model, "default", config), config)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
