"""The factors of every method built on ΔW = s·B·A."""

import torch
from torch import Tensor, nn

from ..core.adapter import Base, Shape
from ..core.registry import INITS
from ..core.start import Start
from ..core.statistics import Statistics


def factors(shape: Shape, r: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Make A (r, in) and B (out, r), not yet filled."""
    return nn.Parameter(torch.empty(r, shape.in_features)), nn.Parameter(torch.empty(shape.out_features, r))


@torch.no_grad()
def start(
    A: Tensor, B: Tensor, init: str, base: Base, *, scale: float, one_hot: bool, statistics: Statistics | None = None
) -> None:
    """Fill A and B by the init of this name, for the change scale * B A.

    Embeddings start the other way round (A zero, B standard normal), as in loralib and PEFT: a one-hot input picks one
    column of A, so a random A would be noise per token, and its rows have no fan-in to scale by.
    """
    if one_hot:
        A.zero_()
        B.normal_()
    else:
        INITS[init](A, B, Start(base, scale, statistics))


def starts_off_zero(init: str) -> bool:
    """Whether the init's B A is not zero, so that it has to be taken off again (`core/chain.py`)."""
    return bool(vars(INITS.module(init)).get("FROM_BASE", False))
