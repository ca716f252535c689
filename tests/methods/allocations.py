"""Counting what an operation makes on its way."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NothingAsLargeAs(TorchDispatchMode):
    """Fail on any operation that makes a tensor of `limit` or more numbers, also inside. Views make none."""

    def __init__(self, limit: int, known: list[Tensor]) -> None:
        super().__init__()
        self.limit, self.known, self.largest = limit, {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                made = t.numel()
                if function is torch.ops.aten.linalg_vector_norm.default and args[0].dtype != t.dtype:
                    made = args[0].numel()  # on a CPU it converts its argument first
                self.largest = max(self.largest, made)
                assert made < self.limit, f"{function} made {made} numbers"
        return out
