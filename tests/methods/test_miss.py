"""MiSS against its closed forms and against PEFT's layer."""

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core.errors import UsageError

from .oracle import Twins
from .problem import IN, OUT, Problem, close, perturb

MiSS = lk.METHODS["miss"]


def linear(inner: int = 12, out: int = 8, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(inner, out, bias=bias).double()


@pytest.mark.parametrize("r", [1, 3, 4, 11])
def test_every_shard_changes_by_the_same(r: int) -> None:
    p = Problem(MiSS(r=r))
    perturb(p.adapter)
    D = p.adapter.miss_block.detach()
    assert D.shape == (r, OUT)
    expected = torch.stack([D[i % r] for i in range(IN)], dim=1)
    close(p.delta, expected)
    close(p.model(p.x).detach() - p.base(p.x), p.x @ expected.T)
    assert torch.linalg.matrix_rank(p.delta) <= r


def test_the_first_gradient_sums_over_shards() -> None:
    p = Problem(MiSS(r=4)).backward()
    G = p.gradient()
    close(p.adapter.miss_block.grad, torch.stack([G[:, i::4].sum(1) for i in range(4)]))


def test_mini_repeats_over_the_outputs() -> None:
    model = lk.attach(nn.Sequential(linear()), MiSS(r=4, variant="mini", mini_r=2))
    ((_, _, adapter),) = lk.adapters(model)
    perturb(adapter)
    D = adapter.miss_block.detach()
    assert D.shape == (4, 2)
    close(adapter.delta_weight(), torch.stack([torch.stack([D[i % 4, o % 2] for i in range(12)]) for o in range(8)]))


def test_bat_multiplies_each_block_of_a_row_by_the_same() -> None:
    model = lk.attach(nn.Sequential(linear()), MiSS(r=4, variant="bat"))
    ((_, _, adapter),) = lk.adapters(model)
    perturb(adapter)
    W, D = model[0].weight.detach(), adapter.miss_block.detach()
    merged = adapter.merge(W)
    for i in range(2):
        for j in range(3):
            block = W[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            close(merged[4 * i : 4 * i + 4, 4 * j : 4 * j + 4], block + block @ D[i] + D[i])


@pytest.mark.parametrize("variant", ["standard", "mini", "bat"])
def test_it_starts_at_the_base_to_the_last_bit(variant: str) -> None:
    layer, x = linear(bias=False).float(), torch.randn(5, 12)
    model = lk.attach(nn.Sequential(layer), MiSS(r=4, variant=variant))
    assert torch.equal(model(x), layer.frozen(x))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"r": 4}, {}),
        ({"r": 5}, {}),
        ({"r": 5, "dropout": 0.5}, {"miss_dropout": 0.5}),
        ({"r": 4, "variant": "mini", "mini_r": 2}, {"init_weights": "mini", "mini_r": 2}),
        ({"r": 4, "variant": "bat"}, {"init_weights": "bat"}),
    ],
)
def test_against_pefts_layer(ours: dict[str, object], theirs: dict[str, object]) -> None:
    config = peft.MissConfig(r=ours["r"], **theirs)
    Twins(linear(), MiSS(**ours), config).agree(torch.randn(3, 5, 12).double(), 1e-12)


@pytest.mark.parametrize("r", [4, 5])
def test_dropout_is_on_the_input_as_in_peft(r: int) -> None:
    twins = Twins(linear(), MiSS(r=r, dropout=0.5), peft.MissConfig(r=r, miss_dropout=0.5))
    x, outputs = torch.randn(3, 5, 12).double(), []
    still = twins.ours(x)
    for model in (twins.ours.train(), twins.theirs.train()):
        torch.manual_seed(4)
        outputs.append(model(x))
    close(*outputs, 1e-12)
    assert not torch.allclose(outputs[0], still)


@pytest.mark.parametrize(
    "bad",
    [{"r": 0}, {"mini_r": 0}, {"dropout": 1.0}, {"variant": "large"}, {"variant": "bat", "dropout": 0.1}],
)
def test_impossible_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        MiSS(**bad)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"r": 13}, "wider than the matrix"),
        ({"r": 3, "variant": "bat"}, "blocks of 3 x 3"),
        ({"variant": "mini", "mini_r": 3}, "does not divide"),
    ],
)
def test_layers_that_do_not_fit_are_refused_as_in_peft(settings: dict[str, object], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        lk.attach(nn.Sequential(linear()), MiSS(**settings))
