"""Weights that `torchao.quantization.quantize_` made, weight-only: Int8WeightOnlyConfig, IntxWeightOnlyConfig (1 to 8 bits).

Such a layer stays an `nn.Linear` whose weight is a tensor subclass, so nothing but reading and making that tensor is special.
Every torchao tensor can be read; these two can also be made again, which merging back into few bits needs. Formats that quantize
the activations too run as torchao runs them, and a merged weight then gives other outputs than base and adapter.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow, PerTensor
from torchao.utils import TorchAOBaseTensor

from ..core.errors import UsageError
from ..core.weight import bytes_of, dense, store

LAYERS: Mapping[str, Callable[[nn.Linear], nn.Linear]] = {}
"""None: `torchao.quantization.quantize_` makes them."""


@dense.register
def _(weight: TorchAOBaseTensor) -> Tensor:
    return weight.detach().dequantize()


@store.register
def _(weight: TorchAOBaseTensor, value: Tensor) -> Tensor:
    raise UsageError(
        f"lorakit cannot round a weight to torchao's {type(weight).__name__}",
        fix="merge with requantize=False and quantize the merged model again",
    )


@store.register
def _(weight: Int8Tensor, value: Tensor) -> Tensor:
    return Int8Tensor.from_hp(
        value.to(weight.dtype),
        PerRow() if weight.block_size[0] == 1 else PerTensor(),
        act_quant_kwargs=weight.act_quant_kwargs,
        act_quant_scale=weight.act_quant_scale,
        act_quant_zero_point=weight.act_quant_zero_point,
        act_pre_scale=weight.act_pre_scale,
        reduce_range=weight.reduce_range,
    )


@store.register
def _(weight: IntxUnpackedToInt8Tensor, value: Tensor) -> Tensor:
    return IntxUnpackedToInt8Tensor.from_hp(
        value.to(weight.dtype),
        weight.block_size,
        weight.target_dtype,
        activation_quantization=weight.activation_quantization,
    )


@bytes_of.register
def _(weight: TorchAOBaseTensor) -> int:
    names, _ = weight.__tensor_flatten__()
    inner: list[torch.Tensor] = [vars(weight)[name] for name in names]
    return sum(t.nbytes for t in inner)
