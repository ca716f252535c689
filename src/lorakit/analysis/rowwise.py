"""Rows through a model as it is, with what belongs to which row kept apart: the row is the unit of every interval here.

Rows are padded, of about one length at a time, and run in evaluation mode; only positions that predict a trained token have
logits that are looked at.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import DataError
from ..data.collate import collate_classification, collate_padded
from ..data.dataset import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AT_ONCE = 1024  # tokens, padding included


class Predictions(NamedTuple):
    """Logits (n, vocabulary or classes), what was right (n,), and the row of the batch that each belongs to (n,)."""

    logits: Tensor
    targets: Tensor
    rows: Tensor

    def losses(self) -> Tensor:
        """Give -ln p of each prediction, in fp32 at least."""
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        return F.cross_entropy(self.logits.to(wide), self.targets, reduction="none")

    def by_row(self, values: Tensor, count: int) -> Tensor:
        """Add up values (n,) of predictions by row: (count,), float64."""
        return torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, self.rows, values.double())


@dataclass(frozen=True)
class Rows:
    """Rows for one model. `classes`: they carry a label each; else they are for next-token prediction."""

    model: "PreTrainedModel"
    examples: Sequence[Example]
    pad_id: int
    classes: bool = False

    def __post_init__(self) -> None:
        if not len(self.examples):
            raise DataError("there are no rows to measure on")

    def __len__(self) -> int:
        return len(self.examples)

    def weights(self) -> Tensor:
        """Give what each row counts in the mean (n,): its trained tokens, or 1."""
        counts = [1 if self.classes else sum(label != IGNORED for label in e.labels[1:]) for e in self.examples]
        return torch.tensor(counts, dtype=torch.float64)

    def batches(self, tokens: int = AT_ONCE) -> Iterator[list[int]]:
        """Give the indices of rows to run together: shortest first, at most `tokens` with padding or one row."""
        order = sorted(range(len(self.examples)), key=lambda i: len(self.examples[i].input_ids))
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * len(self.examples[i].input_ids) > tokens:
                yield batch
                batch = []
            batch.append(i)
        yield batch

    def predict(self, indices: Sequence[int]) -> Predictions:
        """Run rows through the model as it is now, with gradients if they are enabled."""
        chosen = [self.examples[i] for i in indices]
        model: Any = self.model
        device = next(model.parameters()).device
        if self.classes:
            batch, _ = collate_classification(chosen, self.pad_id)
            inputs = {key: value.to(device) for key, value in batch.items()}
            labels = inputs.pop("labels")
            return Predictions(model(**inputs).logits, labels, torch.arange(len(chosen), device=device))
        batch, _ = collate_padded(chosen, self.pad_id)
        inputs = {key: value.to(device) for key, value in batch.items()}
        targets = inputs.pop("labels")[:, 1:]
        keep = targets != IGNORED
        needed = keep.any(0).nonzero().flatten()  # positions that any of the rows needs
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits = model(**inputs, use_cache=False, logits_to_keep=needed).logits
        else:
            logits = model(**inputs, use_cache=False).logits[:, needed]
        keep = keep[:, needed]
        return Predictions(logits[keep], targets[:, needed][keep], keep.nonzero()[:, 0])
