"""The loss of each row under several models that are one after the other, and what two of them differ by on the same rows."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..theory.number import Kind, Number
from ..theory.strength import interval, resampled
from .rowwise import Rows


@torch.no_grad()
def row_losses(rows: Rows) -> Tensor:
    """Give the summed loss of each row (n,) under the model as it is now."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    for indices in rows.batches():
        predicted = rows.predict(indices)
        found[indices] = predicted.by_row(predicted.losses(), len(indices)).cpu()
    return found


@dataclass(frozen=True)
class Losses:
    """Rows under the base model (None for a classifier, whose base has no trained head), the adapter, and what became of it."""

    weights: Tensor
    base: Tensor | None
    before: Tensor
    after: Tensor

    def numbers(self) -> dict[str, Number]:
        """Give the three losses, after - before, and the share of the adapter's gain that is lost, with intervals over rows."""
        columns = [self.before, self.after] if self.base is None else [self.before, self.after, self.base]
        sums = torch.stack(columns, 1)
        means = (sums.sum(0) / self.weights.sum()).tolist()
        draws = resampled(sums, self.weights)
        n = len(self.weights)
        change = Number(
            means[1] - means[0], Kind.ESTIMATE, "loss_difference", 0.0, interval(draws[:, 1] - draws[:, 0]), n
        )
        names = ("loss_before", "loss_after", "loss_base")
        found = {
            name: Number(mean, Kind.ESTIMATE, "loss", interval=interval(draws[:, i]), n=n)
            for i, (name, mean) in enumerate(zip(names, means, strict=False))
        }
        found["loss_increase"] = change
        if self.base is not None:
            gain = means[2] - means[0]
            value = (means[1] - means[0]) / gain if gain > 0 else math.nan
            lost = (draws[:, 1] - draws[:, 0]) / (draws[:, 2] - draws[:, 0]).where(draws[:, 2] > draws[:, 0], torch.nan)
            found["lost_gain"] = Number(value, Kind.ESTIMATE, "gain_share", 0.0, interval(lost), n)
        return found
