"""MoRA against its definition as compress, square matrix and decompress, written out entry by entry."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.adapter import Shape
from lorakit.core.errors import UsageError

from .problem import IN, OUT, Problem, close, perturb

MoRA = lk.METHODS["mora"]
VARIANTS = ["rotation", "sharing"]
# out, in, r: square, narrowing, widening; with k that divides, that does not, and that is longer than a side
SHAPES = [(16, 16, 2), (7, 11, 1), (11, 7, 2), (40, 9, 1), (9, 40, 1), (5, 30, 1), (3, 3, 20), (2, 9, 12)]


def side(out: int, inputs: int, r: int, variant: str) -> int:
    k = math.floor(math.sqrt((out + inputs) * r))
    return k - k % 2 if variant == "rotation" else k


def turned(v: Tensor, position: int) -> Tensor:
    """RoPE: the plane of entries j and j + k/2 turned by position / 10000^(2j/k)."""
    k, out = len(v), v.clone()
    for j in range(k // 2):
        angle = position / 10000 ** (2 * j / k)
        c, s = math.cos(angle), math.sin(angle)
        out[j], out[j + k // 2] = c * v[j] - s * v[j + k // 2], s * v[j] + c * v[j + k // 2]
    return out


def change(x: Tensor, M: Tensor, out: int, variant: str) -> Tensor:
    """ΔW x, by the definition."""
    k, inputs = len(M), len(x)
    n = -(-inputs // k)
    groups = [torch.stack([x[(i * k + j) % inputs] for j in range(k)]) for i in range(n)]
    if variant == "sharing":
        y = M @ torch.stack(groups).sum(0)
    else:
        y = torch.cat([M @ turned(group, i) for i, group in enumerate(groups)])
    return torch.stack([y[i % len(y)] for i in range(out)])


def adapted(out: int, inputs: int, r: int, variant: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Linear(inputs, out)).double(), MoRA(r=r, variant=variant))
    ((_, _, adapter),) = lk.adapters(model)
    return model, adapter


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("out", "inputs", "r"), SHAPES)
def test_the_change_is_its_definition(out: int, inputs: int, r: int, variant: str) -> None:
    model, a = adapted(out, inputs, r, variant)
    perturb(a)
    M = a.mora_M.detach()
    assert M.shape == (side(out, inputs, r, variant),) * 2
    expected = torch.stack([change(e, M, out, variant) for e in torch.eye(inputs).double()], 1)
    close(a.delta_weight().detach(), expected)
    x = torch.randn(2, 4, inputs).double()
    frozen = nn.functional.linear(x, model[0].weight, model[0].bias)
    close((model(x) - frozen).detach(), x @ expected.T)


@pytest.mark.parametrize("variant", VARIANTS)
def test_never_more_parameters_than_lora(variant: str) -> None:
    """And nearly as many: the next side (for rotation the next even one) would have more."""
    for out, inputs in [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 11008), (7, 11), (33, 2)]:
        for r in (1, 2, 3, 8, 64, 256):
            budget = r * (out + inputs)
            k = MoRA(r=r, variant=variant).side(Shape(out, inputs))
            step = 2 if variant == "rotation" else 1
            assert k**2 <= budget < (k + step) ** 2
    assert sum(p.numel() for p in adapted(40, 60, 4, variant)[1].parameters()) == 20**2


@pytest.mark.parametrize(("variant", "rank"), [("rotation", 40), ("sharing", 12)])
def test_the_rank_is_high(variant: str, rank: int) -> None:
    """LoRA's would be 2 with as many parameters (160). Rotation: blocks of 12 that fill the diagonal; sharing: k."""
    model, a = adapted(40, 40, 2, variant)
    perturb(a)
    assert int(torch.linalg.matrix_rank(a.delta_weight())) == rank
    assert lk.summary(model).trainable == 144


def fixed_maps(k: int, n: int, variant: str) -> list[tuple[Tensor, Tensor]]:
    """Pairs (D, C) with ΔW = sum of D M C, for the layer of `problem.py`."""
    columns = torch.eye(IN).double()
    fill = torch.stack([columns[j % IN] for j in range(n * k)])
    length = n * k if variant == "rotation" else k
    rows = torch.stack([torch.eye(length).double()[i % length] for i in range(OUT)])
    if variant == "sharing":
        return [(rows, fill.reshape(n, k, IN).sum(0))]
    turns = [torch.stack([turned(e, i) for e in torch.eye(k).double()], 1) for i in range(n)]
    return [(rows[:, i * k : (i + 1) * k], turns[i] @ fill[i * k : (i + 1) * k]) for i in range(n)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_gradient_and_the_first_step(variant: str) -> None:
    p = Problem(MoRA(r=1, variant=variant))
    assert torch.equal(p.model(p.x), p.base(p.x))
    k = side(OUT, IN, 1, variant)
    maps, G = fixed_maps(k, -(-IN // k), variant), p.backward().gradient()
    gradient = sum(D.T @ G @ C.T for D, C in maps)
    close(p.adapter.mora_M.grad, gradient)
    torch.optim.SGD(p.parameters(), lr=1e-2).step()
    close(p.delta, -1e-2 * sum(D @ gradient @ C for D, C in maps))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_convolution_is_changed_as_its_matrix(variant: str) -> None:
    torch.manual_seed(0)
    method = MoRA(r=1, variant=variant)
    model = lk.attach(nn.Sequential(nn.Conv2d(3, 5, 2)).double(), method, target_modules=["0"])
    ((_, base, a),) = lk.adapters(model)
    perturb(a)
    expected = torch.stack([change(e, a.mora_M.detach(), 5, variant) for e in torch.eye(12).double()], 1)
    x = torch.randn(2, 3, 4, 4).double()
    close((model(x) - base.frozen(x)).detach(), base.project(x, expected).detach())


def test_an_embedding_and_a_layer_too_small_are_refused() -> None:
    with pytest.raises(UsageError, match="embedding"):
        lk.attach(nn.Sequential(nn.Embedding(30, 8)), MoRA(), target_modules=["0"])
    with pytest.raises(UsageError, match="the side 0"):
        lk.attach(nn.Sequential(nn.Linear(1, 2)), MoRA(r=1))


@pytest.mark.parametrize("bad", [{"r": 0}, {"dropout": 1.0}, {"variant": "6"}])
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        MoRA(**bad)


def test_a_rank_for_some_layers() -> None:
    model = lk.attach(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20)), MoRA(r=2), rank_pattern={"1": 8})
    assert [len(a.mora_M) for _, _, a in lk.adapters(model)] == [10, 20]
    with pytest.raises(UsageError, match="no alpha"):
        lk.attach(nn.Sequential(nn.Linear(20, 30)), MoRA(r=2), alpha_pattern={"0": 8.0})
