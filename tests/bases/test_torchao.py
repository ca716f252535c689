"""Models that torchao has quantized, weights only: adapters attach, train, merge and come off."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.weight import bytes_of, dense, store

pytest.importorskip("torchao")

from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

FORMATS: dict[str, Callable[[], object]] = {
    "int8": Int8WeightOnlyConfig,
    "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
    "int6": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int6),
}


@pytest.fixture(params=FORMATS)
def config(request: pytest.FixtureRequest) -> object:
    return FORMATS[request.param]()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def model(config: object, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)
    quantize_(model, config)
    return model


@pytest.fixture
def x(dtype: torch.dtype) -> Tensor:
    return torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)


def close(a: Tensor, b: Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[a.dtype]
    torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance)


def test_an_adapter_on_such_a_model(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    before, kept = model(x), model[0].weight
    lk.attach(model, lk.LoRA(r=4))
    assert [path for path, _, _ in lk.adapters(model)] == ["0", "2"]
    assert torch.equal(model(x), before)
    for path, layer, adapter in lk.adapters(model):
        nn.init.normal_(adapter.lora_B, std=0.05)
        if path == "0":
            close(layer.frozen(x), nn.functional.linear(x, dense(kept), layer.bias))
    y = model(x)
    y.float().square().sum().backward()
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    lk.merge(model)
    assert type(model[0].weight) is nn.Parameter
    assert model[0].weight.dtype == dtype
    close(model(x), y)
    lk.unmerge(model)
    assert model[0].weight is kept
    assert torch.equal(model(x), y)


def test_merged_weights_can_be_rounded_again(model: nn.Module, x: Tensor) -> None:
    lk.attach(model, lk.LoRA(r=4))
    for _, _, adapter in lk.adapters(model):
        nn.init.normal_(adapter.lora_B, std=0.05)
    ((_, layer, adapter), _) = lk.adapters(model)
    kept = layer.weight
    wanted = store(kept, dense(kept).float() + adapter.delta_weight().detach())
    lk.merge(model, requantize=True)
    assert isinstance(layer.weight, type(kept))
    assert torch.equal(dense(layer.weight), dense(wanted))
    step = (dense(wanted) - dense(kept).float() - adapter.delta_weight().detach()).abs().amax()
    assert 0 < step < 0.2


def test_the_bytes_are_those_of_the_inner_tensors(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(48, 32, bias=False)).to(dtype)
    quantize_(model, Int8WeightOnlyConfig())
    lk.attach(model, lk.LoRA(r=2))
    assert bytes_of(model[0].weight) == 32 * 48 + 32 * (4 + 1)  # values, and for each row a scale and a zero point
    assert lk.summary(model).total - lk.summary(model).adapter == 32 * 48


def test_a_format_that_cannot_be_made_can_be_read() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False)).bfloat16()
    quantize_(model, Float8WeightOnlyConfig())
    lk.attach(model, lk.LoRA(r=2))
    assert model[0].matrix().dtype == torch.bfloat16
    with pytest.raises(lk.LorakitError, match="cannot round a weight"):
        lk.merge(model, requantize=True)
