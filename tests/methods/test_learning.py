"""Every method learns: a change of the layers that it can make is found, and what was frozen stays as it was."""

import copy

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.optim import OPTIMIZERS, parameter_groups
from lorakit.train.config import OptimConfig


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))


@pytest.mark.parametrize("name", sorted(lk.METHODS))
def test_the_loss_falls(name: str) -> None:
    """The teacher is the same network with other biases and a rank-one change of each matrix: work for any change."""
    torch.manual_seed(0)
    model = network()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (teacher[0], teacher[2], teacher[4]):
            layer.bias.add_(torch.randn_like(layer.bias))
            layer.weight.add_(torch.outer(torch.randn(layer.out_features), torch.randn(layer.in_features)) / 4)
    x = torch.randn(64, 12)
    y = teacher(x).detach()
    before = copy.deepcopy(model.state_dict())
    lk.attach(model, lk.METHODS[name]())
    config = OptimConfig(lr=1e-2)
    optimizer = OPTIMIZERS["adamw"](parameter_groups(model, "default", config), config)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
