"""Full fine-tuning: training the change is training the matrix."""

import copy

import pytest
import torch

import lorakit as lk

from .problem import Problem, close

Full = lk.METHODS["full"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_steps_are_those_of_the_matrix_itself(optimizer: type[torch.optim.Optimizer]) -> None:
    p = Problem(Full())
    plain = copy.deepcopy(p.base)
    mine, theirs = optimizer(p.parameters(), lr=1e-3), optimizer([plain[0].weight], lr=1e-3)
    for _ in range(10):
        p.backward()
        close(p.adapter.change.grad, p.gradient())
        mine.step()
        theirs.zero_grad()
        (0.5 * (plain(p.x) - p.y).square().sum()).backward()
        theirs.step()
    close(p.merged, plain[0].weight.detach())
    assert torch.equal(p.layer.weight, p.base[0].weight)


def test_small_steps_are_not_lost_on_a_base_in_bf16() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)).bfloat16()
    torch.nn.init.ones_(model[0].weight)
    lk.attach(model, Full())
    ((_, layer, adapter),) = lk.adapters(model)
    with torch.no_grad():
        for _ in range(100):
            adapter.change.add_(1e-3)
    assert torch.equal(layer.weight + 1e-3, layer.weight), "one step is lost in bf16"
    torch.testing.assert_close(adapter.merge(layer.weight.float()), torch.full((8, 8), 1.1))
