"""What a step of a run needs, found out without data on a skeleton of its model; and how many blocks it must recompute to fit."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..bases import require
from ..core.attach import Replacement, adapters, place, trainable, use
from ..core.errors import UsageError
from ..core.target import Target
from ..models.load import pick_device
from ..models.memory import Estimate, estimate
from ..models.modes import checkpoint_activations, recomputable
from ..models.quantize import saved_bytes
from ..optim import OPTIMIZERS, parameter_groups
from .base import with_head
from .config import RunConfig
from .start import with_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.dataset import Dataset

ADAPTER = "default"
ROOM = 0.9  # share of the free memory that `auto` fills: the estimate is good to 15 %, and mostly to 10 %


def adapted(model: "PreTrainedModel", config: RunConfig, head: Sequence[str]) -> "PreTrainedModel":
    """Put the adapter of a run on a skeleton; `head` is trained in full. Start values, which need weights, are left out."""
    target: Target = with_head(config.method.target, list(head))
    method, target, _ = with_experts(model, config.method.config, target)
    place(model, method, target, ADAPTER)
    trainable(use(model, ADAPTER), ADAPTER)
    return model


def requirement(
    config: RunConfig, data: "Dataset", model: "PreTrainedModel", recomputed: int, *, runtime: int | None = None
) -> Estimate:
    """Estimate memory and work of one step on the longest rows, on a skeleton with its adapter.

    recomputed: blocks whose activations are not kept (True: all). runtime: see `estimate`.
    """
    checkpoint_activations(model, recomputed)
    length = max(data.lengths)
    rows = max(1, config.train.batch_tokens // length) if config.train.batch_tokens else config.train.batch_size
    share = data.stats.trained_tokens / data.stats.tokens
    need = estimate(
        model,
        rows=rows,
        length=length,
        trained_tokens=round(rows * length * share) if data.labels is None else None,
        packed=data.labels is None,
        accumulate=config.train.accumulate,
        optimizer=_optimizer_bytes(config, model),
        device=pick_device(),
        runtime=runtime,
        threads=torch.get_num_threads(),
    )
    return replace(need, weights=need.weights - _saved_by_quantizing(config, model))


@dataclass(frozen=True)
class Choice:
    """What `train.checkpointing` comes to. blocks: of how many that could be chosen."""

    recomputed: int
    blocks: int
    need: int
    """Bytes with so many blocks recomputed."""
    kept: int
    """Bytes with none."""
    free: int

    @property
    def words(self) -> str:
        """Say it."""
        if not self.free:
            return "checkpointing auto: the system does not say how much memory is free; nothing is recomputed"
        first = f"of {self.blocks} blocks that keep activations, {self.recomputed} recompute them"
        said = f"checkpointing auto: {first}; {self.need / 1e9:.2f} GB needed"
        said += f" ({self.kept / 1e9:.2f} without), {self.free / 1e9:.2f} GB free" if self.recomputed else ""
        return said + ("; that is too little" if self.need > self.free else "")


def choose(
    config: RunConfig,
    data: "Dataset",
    model: "PreTrainedModel",
    free: int,
    *,
    runtime: int | None = None,
    loaded: bool = False,
) -> Choice:
    """Find the smallest number of blocks to recompute with which a step fits into `free` bytes, on a skeleton.

    loaded: the weights and the adapter are in memory already. UsageError for a model whose need cannot be foretold.
    """
    blocks = len(recomputable(model))

    @functools.cache
    def need(count: int) -> int:
        found = requirement(config, data, model, count, runtime=runtime)
        return found.total - (found.weights + found.adapter if loaded else 0)

    try:
        count = smallest(need, blocks, ROOM * free) if free and blocks else 0
        return Choice(count, blocks, need(count), need(0), free)
    except UsageError as error:
        fix = "set train.checkpointing to true, false or a number of blocks"
        raise UsageError(error.what, why=error.why, fix=fix) from error


def smallest(need: Callable[[int], int], most: int, room: float) -> int:
    """Give the smallest count from 0 to `most` with need(count) <= room, or `most` if there is none.

    `need` falls, nearly in a straight line; each call of it is a traced step, so the next guess is taken from that line.
    """
    low, high = 0, most
    if need(low) <= room:
        return low
    if need(high) > room:
        return high
    while high - low > 1:
        share = (need(low) - room) / (need(low) - need(high))
        guess = min(max(low + math.ceil(share * (high - low)), low + 1), high - 1)
        low, high = (low, guess) if need(guess) <= room else (guess, high)
    return high


def _optimizer_bytes(config: RunConfig, model: Any) -> int:
    """Give the bytes that the optimizer says its state will take."""
    groups = parameter_groups(model, ADAPTER, config.optim)
    return vars(OPTIMIZERS.module(config.optim.name))["planned_bytes"](groups, config.optim)


def _saved_by_quantizing(config: RunConfig, model: Any) -> int:
    """Give the bytes that model.quantize takes off the weights."""
    if config.model.quantize is None:
        return 0
    require(config.model.quantize)
    in_full = [path for path, _, adapter in adapters(model) if isinstance(adapter, Replacement)]
    return saved_bytes(model, config.model.quantize, in_full)
