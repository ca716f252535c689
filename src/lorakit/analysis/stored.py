"""The numbers a weight can hold after it is stored in a format: a cast for floats, quantization and back for 4 and 8 bits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..bases import FORMATS, maker, require
from ..core.errors import UsageError
from ..core.weight import dense
from .loaded import LoadedModule

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPELLINGS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
HEADS = ("lm_head", "embed_out", "score", "classifier")

Grid = Callable[[Tensor], Tensor]
"""Rounds a matrix (out, in) to what the format can hold; float64 in and out."""


def find_format(name: str) -> str:
    """Give our short name of a format: bf16, fp16, fp32, nf4, fp4, int8. Raises UsageError for others and missing packages."""
    short = SPELLINGS.get(name, name)
    if short not in FLOATS and short not in FORMATS:
        raise UsageError(f"unknown dtype {name!r}", fix=f"one of {', '.join([*FLOATS, *FORMATS])}")
    if short in FORMATS:
        require(short)
    return short


def grid(name: str) -> Grid:
    """Give the rounding of a format of `find_format`."""
    if name in FLOATS:
        return lambda values: values.to(FLOATS[name]).double()
    make = maker(name)

    def quantized(values: Tensor) -> Tensor:
        layer = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(values.float().contiguous(), requires_grad=False)
        return dense(make(layer).weight).double()

    return quantized


def is_quantized(module: LoadedModule) -> bool:
    """Whether a quantized model stores this module quantized: linear layers, the output head not."""
    return module.kind == "linear" and module.layer.rpartition(".")[2] not in HEADS
