"""What a model on a GPU trains on: each operation torch's or Triton's, measured on this machine at this model's widths."""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..kernels import trials
from ..kernels.choice import PLAIN, Choice, Trial, choose
from .blocks import FastBlock, activation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measured(
    model: "PreTrainedModel",
    blocks: Sequence[FastBlock],
    head: Tensor | None,
    agree: Callable[[], bool],
    known: Collection[str] | None = None,
    choose: Callable[[list[Trial], Collection[str] | None], Choice] = choose,
) -> Choice:
    """Let the blocks run on what is chosen, if the model then still agrees with itself.

    head: None if the loss has logits. known: what was chosen before, see `choose`.
    """
    with torch.cuda.device_of(next(model.parameters())):  # whose queue is timed; nothing without a GPU
        choice = choose(_trials(model, blocks, head), known)
        _forget(model.device)
    for block in blocks:
        block.kernels = choice.kernels
    if blocks and not _holds(agree):
        for block in blocks:
            block.kernels = PLAIN
        softmax, words = choice.kernels.softmax, f"{choice.words}; torch in the blocks, which do not agree"
        return Choice(PLAIN._replace(softmax=softmax), words, tuple({"softmax"}.intersection(choice.names)))
    return choice


def _forget(device: torch.device) -> None:
    """Give the trials' memory back, and let the peak be that of training."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _trials(model: "PreTrainedModel", blocks: Sequence[FastBlock], head: Tensor | None) -> list[Trial]:
    place, config = trials.Place(model.device, model.dtype), cast(Any, model.config.get_text_config())
    found = []
    if blocks:
        first = blocks[0]
        found += [
            trials.norm(place, config.hidden_size, wide=first.family.offset),
            trials.gate(place, config.intermediate_size, activation(first.mlp)),
            trials.rotation(place, config.num_attention_heads, first.self_attn.head_dim),
        ]
    return found if head is None else [*found, trials.softmax(place._replace(dtype=head.dtype), len(head))]


def _holds(agree: Callable[[], bool]) -> bool:
    try:
        return agree()
    except Exception:  # compilers and drivers raise whatever they like
        return False
