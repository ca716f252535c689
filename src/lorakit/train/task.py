"""What is learned: how rows become a batch, the loss of a batch, and what an evaluation measures.

Losses are sums. The loop divides by the weight (trained tokens, or rows) of the whole optimizer step, so that one batch of
four rows and four batches of one row are the same step, and padding or packing changes nothing.
"""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..data.collate import collate_classification, collate_packed, collate_padded
from ..data.dataset import IGNORED, Example
from ..models.fast import ORDINARY, Fast, summed
from ..models.prefix import Prefix


class Task(Protocol):
    """How the loop trains on rows without knowing what they are."""

    worst: float
    """Loss of a uniform guess: a run that was better and comes to stay there has diverged."""

    def weight(self, example: Example) -> int:
        """Give what a row counts in the mean: its trained tokens, or 1."""
        ...

    def loss(self, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, int]:
        """Give the sum of the losses of a micro-batch, and how many rows were right (0 where rows are not right or wrong)."""
        ...

    def measures(self, loss: float, accuracy: float) -> dict[str, float]:
        """Name the results of an evaluation."""
        ...


class LanguageModelling:
    """Next-token prediction on the tokens whose label is not -100 (sft, completion). `fast`: how the model runs, if packed.

    `prefix`: what the blocks below the lowest adapter give for the rows of training, while a run keeps it.
    """

    def __init__(self, vocabulary: float, pad_id: int, *, packed: bool, fast: Fast = ORDINARY) -> None:
        self.worst = float(torch.tensor(vocabulary).log())
        self.pad_id, self.packed, self.fast = pad_id, packed, fast
        self.prefix: Prefix | None = None

    def weight(self, example: Example) -> int:
        """Count the trained tokens."""
        return sum(label != IGNORED for label in example.labels)

    def loss(self, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, int]:
        """Give the summed cross entropy of the trained tokens. Only those positions have logits, if packed."""
        if self.packed:
            return self.losses(model, [examples])[0], 0
        device = next(model.parameters()).device
        inputs, _ = collate_padded(examples, self.pad_id)
        inputs = {key: value.to(device) for key, value in inputs.items()}
        targets = inputs.pop("labels")[:, 1:]
        keep = targets != IGNORED
        logits, targets = model(**inputs, use_cache=False).logits[:, :-1][keep], targets[keep]
        return summed(logits, targets), 0

    def losses(self, model: nn.Module, groups: Sequence[Sequence[Example]]) -> list[Tensor]:
        """Give the summed loss of each group of rows, all packed into one row of tokens, group after group."""
        device = next(model.parameters()).device
        rows = [row for group in groups for row in group]
        inputs, lengths = collate_packed(rows)
        inputs = {key: value.to(device) for key, value in inputs.items()}
        labels = inputs.pop("labels")[0]
        before = (labels[1:] != IGNORED).nonzero().flatten()  # positions that predict a trained token
        how: dict[str, Any] = {"lengths": lengths}
        if self.prefix is not None and model.training:  # evaluations see the whole model run, on rows of their own
            how["prefix"] = self.prefix.of(cast(Any, model), [row.input_ids for row in rows])
        each = self.fast.row_losses(cast(Any, model), inputs, before, labels[before + 1], **how)
        return [own.sum() for own in each.split([predicted(rows) for rows in groups])]

    def measures(self, loss: float, accuracy: float) -> dict[str, float]:
        """Give the mean loss of a token."""
        return {"eval_loss": loss}


def predicted(rows: Sequence[Example]) -> int:
    """Count the positions of rows that predict a trained token: the first token of a row has none before it."""
    return sum(label != IGNORED for row in rows for label in row.labels[1:])


class Classification:
    """One label per row."""

    def __init__(self, classes: int, pad_id: int) -> None:
        self.worst = float(torch.tensor(float(classes)).log())
        self.pad_id = pad_id

    def weight(self, example: Example) -> int:
        """Count the row."""
        return 1

    def loss(self, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, int]:
        """Give the summed cross entropy of the rows' labels."""
        device = next(model.parameters()).device
        batch, _ = collate_classification(examples, self.pad_id)
        inputs: dict[str, Any] = {key: value.to(device) for key, value in batch.items()}
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return summed(logits, labels), int((logits.argmax(-1) == labels).sum())

    def measures(self, loss: float, accuracy: float) -> dict[str, float]:
        """Give the mean loss and the share of right rows."""
        return {"eval_loss": loss, "eval_accuracy": accuracy}
