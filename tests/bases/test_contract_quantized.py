"""The laws of every method on a linear layer that is stored in 4 or 8 bits. A new method, and a new format, is covered on arrival."""

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.bases import FORMATS
from lorakit.core.weight import dense
from lorakit.models.quantize import quantize

pytest.importorskip("bitsandbytes")


def _contract() -> ModuleType:
    file = Path(__file__).parents[1] / "core" / "test_contract.py"
    spec = importlib.util.spec_from_file_location("contract_of_methods", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract = _contract()
method = contract.method
attach, perturb, close, only_if_mergeable = (
    contract.attach,
    contract.perturb,
    contract.close,
    contract.only_if_mergeable,
)

# These take the fixtures of this file.
test_attaching_changes_no_bit = contract.test_attaching_changes_no_bit
test_only_the_adapter_learns = contract.test_only_the_adapter_learns
test_base_keys_and_class_do_not_change = contract.test_base_keys_and_class_do_not_change
test_two_adapters_are_two_models = contract.test_two_adapters_are_two_models


@pytest.fixture(params=["linear", "linear_no_bias", "fused"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return contract.DTYPES[request.param]


@pytest.fixture(params=["nf4"])
def stored(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str, dtype: torch.dtype, stored: str) -> nn.Module:
    torch.manual_seed(0)
    model = contract.Toy(contract.KINDS[kind][0]()).to(dtype)
    quantize(model, stored)
    return model


@pytest.fixture
def x(kind: str, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    return contract.KINDS[kind][1]().to(dtype)


def test_forward_is_a_linear_layer_with_the_merged_weight(
    model: nn.Module, method: lk.Method, kind: str, x: Tensor
) -> None:
    """Against x W'^T + b' in fp32, W' the merged form of what is read from the stored weight."""
    perturb(attach(model, method, kind))
    only_if_mergeable(model)
    ((_, layer, adapter),) = lk.adapters(model)
    wide = layer.matrix().float()
    bias = None if layer.bias is None else layer.bias.float()
    merged, merged_bias = adapter.merge(wide), adapter.merge_bias(bias)
    expected = nn.functional.linear(x.float(), merged, merged_bias)
    before = nn.functional.linear(x.float(), wide, bias)
    assert (expected - before).norm() > 0.002 * before.norm(), "the perturbed adapter must do something"
    close(layer(x), expected.to(x.dtype))


def test_merging_is_the_forward_and_unmerging_is_exact(
    model: nn.Module, method: lk.Method, kind: str, x: Tensor
) -> None:
    before, stored = copy.deepcopy(model.state_dict()), model.layer.weight
    y = perturb(attach(model, method, kind))(x)
    only_if_mergeable(model)
    for _ in range(2):
        close(lk.merge(model)(x), y)
        assert type(model.layer.weight) is nn.Parameter
        lk.unmerge(model)
        assert model.layer.weight is stored
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
        assert torch.equal(model(x), y)


@pytest.mark.parametrize(("kind", "dtype"), [("linear", torch.float32)])
@pytest.mark.parametrize("stored", sorted(FORMATS))
def test_every_format_carries_every_method(model: nn.Module, method: lk.Method, kind: str, x: Tensor) -> None:
    attach(model, method, kind)
    perturb(model)(x).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert model.layer.weight.grad is None
    assert torch.isfinite(dense(model.layer.weight)).all()


# An input with a gradient (OFT rotates it) goes through bitsandbytes' autograd function, of which dynamo makes an object.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("kind", "dtype"), [("linear", torch.float32)])
def test_one_graph(model: nn.Module, method: lk.Method, kind: str, x: Tensor) -> None:
    contract.test_one_graph_and_none_anew_when_tensors_change(model, method, kind, x)
