"""Examples to the tensors of one micro-batch, all int64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dataset import IGNORED, Example


@dataclass(frozen=True, order=True)
class Size:
    """The fixed size of a micro-batch: tokens, positions that predict a trained token, documents (padding is one)."""

    tokens: int
    rows: int
    documents: int


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


def size_of(examples: Sequence[Example]) -> Size:
    """Give the size that rows behind each other have, one document for padding included."""
    labels = [label for example in examples for label in example.labels[1:]]
    tokens, rows = sum(len(example.input_ids) for example in examples), sum(label != IGNORED for label in labels)
    return Size(tokens, rows, len(examples) + 1)


def collate_fixed(examples: Sequence[Example], size: Size) -> dict[str, Tensor]:
    """Put rows behind each other and fill them up to `size`, which must be as large as theirs.

    input_ids, position_ids (1, tokens); ends (documents + 1,) int32: where each document ends, after a 0; rows, targets
    (rows,): the positions that predict a trained token, and that token; counted (rows,): 1 where there is one, 0 in the filling
    (whose positions differ: a GPU adds up the gradients of one position one after the other).
    """
    inputs, lengths = collate_packed(examples)
    labels = inputs.pop("labels")[0]
    rows = (labels[1:] != IGNORED).nonzero().flatten()
    missing, spare = size.tokens - labels.numel(), size.rows - len(rows)
    filling = {"input_ids": torch.zeros(1, missing), "position_ids": torch.arange(missing)[None]}
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    ends += [size.tokens] * (size.documents + 1 - len(ends))
    return {
        **{name: torch.cat([values, filling[name].long()], 1) for name, values in inputs.items()},
        "ends": torch.tensor(ends, dtype=torch.int32),
        "rows": torch.cat([rows, torch.arange(spare) % size.tokens]),
        "targets": torch.cat([labels[rows + 1], rows.new_zeros(spare)]),
        "counted": torch.cat([torch.ones(len(rows)), torch.zeros(spare)]),
    }


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
