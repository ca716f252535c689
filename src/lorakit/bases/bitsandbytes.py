"""NF4, FP4 and int8 by bitsandbytes. QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314; LLM.int8(): https://arxiv.org/abs/2208.07339

4 bits: the weight in blocks of 64, each divided by its largest magnitude and rounded to one of 16 levels (NF4: quantiles of a
normal; FP4: a float of 4 bits); the largest magnitudes themselves in 8 bits ("double quantization"), 4.127 bits a weight in
all. Run as x·dense(W)^T in the dtype of x. int8: each row divided by its largest magnitude, 127 levels.

Gradients reach x and never W. What bitsandbytes does on the way and training must not see is switched off here: see the kinds.
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn

from ..core.adapter import Shape
from ..core.errors import UsageError
from ..core.kinds import Kind, LinearKind, kind_of
from ..core.weight import bytes_of, dense, shape_of, store


@dense.register
def _read(weight: Params4bit) -> Tensor:
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


_MAPPED = 32 << 20  # bytes from which glibc asks the system for fresh pages, every time
_PIECE = 1 << 20  # weights dequantized at a time


class _Scratch(threading.local):
    """One buffer a thread and dtype, as large as the largest weight so far, for every layer in turn."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Give `count` numbers of it."""
        if dtype not in self.buffers or self.buffers[dtype].numel() < count:
            self.buffers[dtype] = torch.empty(count, dtype=dtype)
        return self.buffers[dtype][:count]


_SCRATCH = _Scratch()


def _read_passing(weight: Params4bit) -> Tensor:
    """Give what `_read` gives, in memory that the next call overwrites.

    The first touch of fresh pages costs more than the dequantization: 4096 x 11008 in bfloat16 takes 62 ms with them, and
    15 ms in pieces that go through a buffer (one Zen 4 core). Smaller weights get used memory from the heap anyway.
    """
    state, packed = cast(Any, weight.quant_state), weight.data.view(torch.uint8).view(-1)
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    count = torch.Size(state.shape).numel()
    flat = _SCRATCH.take(count, state.dtype)
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    for start in range(0, count, _PIECE):
        end = min(start + _PIECE, count)
        own = scales[start // state.blocksize : -(-end // state.blocksize)].float()
        piece = packed[start // 2 : end // 2]
        made = dequantize(piece, own, state.blocksize, state.quant_type, (end - start,), state.dtype)
        flat[start:end].copy_(made.view(-1))
    return flat.view(state.shape)


def _is_mapped(weight: Tensor) -> bool:
    """Whether a 4-bit weight on a processor is, dequantized, a block that the system has to give."""
    if not isinstance(weight, Params4bit) or weight.device.type != "cpu":
        return False
    state = cast(Any, weight.quant_state)
    count = torch.Size(state.shape).numel()
    return count * state.dtype.itemsize >= _MAPPED and count % 2 == 0 and _PIECE % state.blocksize == 0


@store.register
def _(weight: Params4bit, value: Tensor) -> Tensor:
    made = Params4bit(
        value.detach().to(weight.quant_state.dtype).contiguous(),
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )
    return made.to(weight.device)  # this is what quantizes it


@shape_of.register
def _(weight: Params4bit) -> torch.Size:
    return torch.Size(weight.quant_state.shape)


@bytes_of.register
def _(weight: Params4bit) -> int:
    state = weight.quant_state
    scales = [state.absmax, state.code] + (
        [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    )
    return weight.data.nbytes + sum(t.nbytes for t in scales)


@dense.register
def _(weight: Int8Params) -> Tensor:
    return weight.data * (weight.SCB[:, None] / 127)


@store.register
def _(weight: Int8Params, value: Tensor) -> Tensor:
    made = Int8Params(value.detach().cpu().contiguous(), requires_grad=False, has_fp16_weights=False)
    return made.to(weight.device)


@bytes_of.register
def _(weight: Int8Params) -> int:
    return weight.data.nbytes + (0 if weight.SCB is None else weight.SCB.nbytes)


class FourBitKind(LinearKind):
    """`Linear4bit`, and the same layer with a plain weight once an adapter has been merged into it."""

    PRODUCT = True

    # On processors with AVX512-BF16 bitsandbytes repacks a weight for good when it is first run in eval mode. A repacked weight
    # passes no gradient to x, rounds x and its scales to bfloat16, and must have a multiple of 32 rows.
    support_avx512bf16_for_cpu = property(lambda self: False, lambda self, value: None)

    def shape(self) -> Shape:
        """Give (out, in). Raises UsageError for a weight that was repacked already."""
        if isinstance(self.weight, Params4bit) and vars(self.weight.quant_state).get("packing_format_for_cpu"):
            raise UsageError(
                "bitsandbytes has repacked the weights of this model, which cannot be trained on any more",
                why="it does so when a 4-bit model is run in eval mode on this processor",
                fix="load the model again and attach the adapter before running it",
            )
        return LinearKind.shape(self)  # not super(): a layer is asked for its shape before it is adapted

    def matrix(self) -> Tensor:
        """Give what the weight holds, by a call that torch.compile can follow: it does not through a singledispatch here."""
        return _read(self.weight) if isinstance(self.weight, Params4bit) else self.weight.detach()

    @classmethod
    def reader(cls, layer: Any) -> Callable[[], Tensor]:
        """Dequantize a large weight into one buffer that all such layers use in turn."""
        return partial(_read_passing, layer.weight) if _is_mapped(layer.weight) else partial(cls.matrix, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        if isinstance(self.weight, Params4bit):
            return super().forward(x)
        return _plain(self, x)


class EightBitKind(LinearKind):
    """`Linear8bitLt`, and the same layer with a plain weight once an adapter has been merged into it."""

    def matrix(self) -> Tensor:
        """Give the weight itself, with its scales, which its first run moves into the layer."""
        state = cast(Any, self).state
        if isinstance(self.weight, Int8Params) and self.weight.SCB is None:
            self.weight.CB, self.weight.SCB = self.weight.data, state.SCB
        return LinearKind.matrix(self)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        if isinstance(self.weight, Int8Params):
            return super().forward(x)
        return _plain(self, x)


class Linear8bit(Linear8bitLt):
    """The layer that "int8" makes: `Linear8bitLt`, run on a processor as x·dense(W)^T in eval mode as in training.

    bitsandbytes rounds x to 8 bits there in eval mode, which is neither what was trained nor faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        self.state.CB, self.state.SCB = self.weight.data, self.weight.SCB
        self.state.is_training = True
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return bnb.matmul(x, self.weight, bias=bias, state=self.state)


def _plain(layer: Kind, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


@kind_of.register
def _(layer: Linear4bit) -> type[Kind]:
    return FourBitKind


@kind_of.register
def _(layer: Linear8bitLt) -> type[Kind]:
    return EightBitKind


def _four_bits(layer: nn.Linear, name: str) -> nn.Linear:
    """Give `layer` with its weight in 4 bits, on the same device."""
    weight = layer.weight
    made = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        compress_statistics=True,
        quant_type=name,
        device="meta",
    )
    made.weight = Params4bit(weight.detach(), compress_statistics=True, quant_type=name, module=made).to(weight.device)
    made.bias = layer.bias
    made.support_avx512bf16_for_cpu = False
    return made


def _eight_bits(layer: nn.Linear) -> nn.Linear:
    """Give `layer` with its weight in 8 bits, on the same device."""
    settings: dict[str, Any] = {"bias": False, "has_fp16_weights": False, "threshold": 6.0, "device": "meta"}
    made = Linear8bit(layer.in_features, layer.out_features, **settings)
    weight = Int8Params(layer.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    made.weight = weight.to(layer.weight.device)
    made.bias = layer.bias
    return made


LAYERS: Mapping[str, Callable[[nn.Linear], nn.Linear]] = {
    "nf4": lambda layer: _four_bits(layer, "nf4"),
    "fp4": lambda layer: _four_bits(layer, "fp4"),
    "int8": _eight_bits,
}
