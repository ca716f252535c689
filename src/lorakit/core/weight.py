"""The only module that knows a weight may be stored quantized.

`dense(w)` reads a stored weight as a plain float tensor; `store(w, value)` makes a new weight in the format of `w`;
`shape_of(w)` is the shape of what it holds and `bytes_of(w)` the memory it takes. A quantized format is one file in `bases/`,
named after the package that its tensors come from, which registers these for its tensor types.
"""

from functools import cache, singledispatch

import torch
from torch import Tensor, nn

from .registry import BASES


@singledispatch
def dense(weight: Tensor) -> Tensor:
    """Read a stored weight as a plain float tensor (no copy where it is one)."""
    return weight.detach()


dense.dispatch(nn.Parameter)  # fills its cache: torch.compile compiles a second time if that was empty at the first


@singledispatch
def store(weight: Tensor, value: Tensor) -> Tensor:
    """Make a weight in the format of `weight` holding `value`, rounded once."""
    return value.to(weight.dtype)


@singledispatch
def shape_of(weight: Tensor) -> torch.Size:
    """Give the shape of `dense(weight)` without computing it."""
    return weight.shape


@singledispatch
def bytes_of(weight: Tensor) -> int:
    """Give the bytes that `weight` takes, scales and tables included."""
    return weight.nbytes


@cache
def learn(stored: type) -> None:
    """Import the file of `bases/` for the package of a layer's or tensor's type, if there is one."""
    package = stored.__module__.partition(".")[0]
    if package in list(BASES):
        BASES.module(package)
