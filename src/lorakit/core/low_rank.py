"""The change s B A of one adapter, for what runs several adapters at once: whether it has that form, and what it adds."""

from typing import cast

from torch import Tensor, nn

from ..kernels.low_rank import LowRank
from ..kernels.spans import Dropout
from .adapter import AbstractAdapter, Base
from .errors import UsageError


def low_rank_of(adapter: nn.Module, layer: nn.Module, name: str, path: str) -> LowRank:
    """Give the change of adapter `name` on the layer at `path`. Raises UsageError if it is not s B A of the layer's input."""
    if not isinstance(adapter, AbstractAdapter):
        raise UsageError(
            f"adapter {name!r} trains {path} in full, so it cannot run beside others",
            why="of a module that is replaced there is no frozen base to share",
            fix="leave modules_to_save out, or run it alone",
        )
    change = adapter.low_rank(cast(Base, layer))
    if change is None or change.gain is not None:
        dropped = adapter.training and _at_rest(adapter, layer) is not None
        raise UsageError(
            f"adapter {name!r} cannot run beside others: on {path} it is a {type(adapter).__name__}"
            + (" with dropout" if dropped else ""),
            why="what it adds is not s B A of the layer's input, which could be added to some rows only",
            fix="leave the dropout out"
            if dropped
            else "run it alone, merged (lk.merge) where it must be fast; or take the "
            "best LoRA of the merged model (`lorakit extract`), which is an approximation",
        )
    return change


def low_rank_at_rest(adapter: nn.Module, layer: nn.Module, name: str, path: str) -> LowRank:
    """Give the change without dropout, which belongs to training. Raises what `low_rank_of` raises."""
    training = adapter.training
    adapter.eval()
    try:
        return low_rank_of(adapter, layer, name, path)
    finally:
        adapter.train(training)


def _at_rest(adapter: AbstractAdapter, layer: nn.Module) -> LowRank | None:
    try:
        return low_rank_at_rest(adapter, layer, "", "")
    except UsageError:
        return None


def delta(x: Tensor, change: LowRank, base: Base) -> Tensor:
    """Give s B A x by the verbs of the layer's kind, in the dtype that it computes in."""
    A, B = change.A, change.B
    if x.is_floating_point():  # token ids are not dropped
        A, B, x = A.to(x.dtype), B.to(x.dtype), Dropout(change.dropout, change.generator).forward(x)
    return base.mix(base.project(x, A), B) * change.scale.to(B.dtype)
