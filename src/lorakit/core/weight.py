"""The only module that knows a weight may be stored quantized.

`dense(w)` reads a stored weight as a plain float tensor; `store(w, value)` makes a new weight in the format of `w`.
A quantized format is one file in `bases/` that registers both functions for its tensor type.
"""

from functools import singledispatch

from torch import Tensor


@singledispatch
def dense(weight: Tensor) -> Tensor:
    """Read a stored weight as a plain float tensor (no copy where it is one)."""
    return weight.detach()


@singledispatch
def store(weight: Tensor, value: Tensor) -> Tensor:
    """Make a weight in the format of `weight` holding `value`, rounded once."""
    return value.to(weight.dtype)
