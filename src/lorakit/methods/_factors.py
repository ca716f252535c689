"""The factors of every method built on ΔW = s·B·A."""

import math

import torch
from torch import Tensor, nn

from ..core.adapter import Base, Shape
from ..core.errors import UsageError
from ..core.registry import INITS
from ..core.start import Start
from ..core.statistics import Statistics


def check(r: int, alpha: float | None, dropout: float) -> None:
    """Raise UsageError for a rank, a scale or a dropout that cannot be."""
    if r < 1:
        raise UsageError(f"r must be at least 1, not {r}")
    if alpha is not None and not 0 < alpha <= 1e6:  # NaN is in no range
        raise UsageError(f"alpha must be above 0 and at most 1e6, not {alpha}")
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout must be in [0, 1), not {dropout}")


def check_seed(key: int) -> None:
    """Raise UsageError for a `projection_prng_key` that torch's generators do not take."""
    if not -(2**63) <= key < 2**64:
        raise UsageError(f"projection_prng_key must be a 64-bit integer, not {key}")


def check_starts_at_zero(init: str, method: str, why: str) -> None:
    """Raise UsageError for a start whose B A is not zero, which `method` has no way to take off again; `why` says why."""
    if starts_off_zero(init):
        raise UsageError(
            f"init {init!r} and {method} do not go together",
            why=f"it starts from factors of W, taken off again by a second term{why}",
            fix="take an init that starts B at zero, such as kaiming",
        )


def alpha_or_default(r: int, alpha: float | None) -> float:
    """Give alpha as a number: twice the rank if it was not given."""
    return float(2 * r if alpha is None else alpha)


def scaling(r: int, alpha: float, stabilized: bool) -> Tensor:
    """Give s: alpha/r, or alpha/sqrt(r). A tensor, for torch.compile would compile again for another float."""
    return torch.tensor(alpha / (math.sqrt(r) if stabilized else r))


_NONE = nn.Identity()
"""Stands in every adapter without dropout: a model has thousands of them, and each module of its own makes every look through
the model longer."""


def dropout(p: float) -> nn.Module:
    """Give the module that drops a share p of the entries while training."""
    return nn.Dropout(p) if p else _NONE


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


def starts_zero(init: str) -> str:
    """Give the factor that the init starts at zero, "A" or "B"; "B" also where it starts neither so."""
    return str(vars(INITS.module(init)).get("ZERO", "B"))


def starts_off_zero(init: str) -> bool:
    """Whether the init's B A is not zero, so that it has to be taken off again (`core/chain.py`)."""
    return bool(vars(INITS.module(init)).get("FROM_BASE", False))
