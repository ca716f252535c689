"""Examples to the tensors of one micro-batch, all int64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dataset import IGNORED, Example

Batch = tuple[dict[str, Tensor], list[int]]


def collate_packed(examples: Sequence[Example]) -> Batch:
    """Put rows behind each other without padding; gives the inputs, each (1, T), and the length of each row.

    position_ids restart at 0 in each row. labels are not shifted; the first one of a row is -100, because the token in
    front of it belongs to another row.
    """
    lengths = [len(example.input_ids) for example in examples]
    inputs = {
        "input_ids": [token for example in examples for token in example.input_ids],
        "position_ids": [position for length in lengths for position in range(length)],
        "labels": [label for example in examples for label in (IGNORED, *example.labels[1:])],
    }
    return {name: torch.tensor([values]) for name, values in inputs.items()}, lengths


def collate_padded(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad rows on the right; gives the inputs, each (B, longest), and the length of each row.

    attention_mask is 1 on the row's own tokens by its length, so a row may contain `pad_id` (often the end token).
    labels are not shifted and -100 on padding.
    """
    lengths = [len(example.input_ids) for example in examples]
    inputs = {
        "input_ids": _pad([example.input_ids for example in examples], pad_id),
        "attention_mask": _pad([[1] * length for length in lengths], 0),
        "labels": _pad([example.labels for example in examples], IGNORED),
    }
    return inputs, lengths


def collate_classification(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad rows on the right with their classes as labels (B,); token_type_ids (B, longest) where the rows have them."""
    lengths = [len(example.input_ids) for example in examples]
    inputs = {
        "input_ids": _pad([example.input_ids for example in examples], pad_id),
        "attention_mask": _pad([[1] * length for length in lengths], 0),
        "labels": torch.tensor([example.label for example in examples]),
    }
    types = [example.token_type_ids for example in examples if example.token_type_ids is not None]
    if len(types) == len(examples) > 0:
        inputs["token_type_ids"] = _pad(types, 0)
    return inputs, lengths


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
