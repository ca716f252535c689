"""BitFit: Simple Parameter-efficient Fine-tuning. Ben Zaken, Ravfogel and Goldberg 2021,
https://arxiv.org/abs/2106.10199

    b' = b + c        c: (out,) starts at 0; W' = W

Only biases are trained, out numbers a layer. What is learned is the change, so that the base is never touched.

Departures from the paper: it trains every bias of the model, also those of the layer norms; this trains those of the
targeted layers. To train the norms too, name them in `modules_to_save` (their weights are then trained as well).

When: a lower bound is wanted, or a few thousand numbers must do, on a model whose layers have biases. It costs next
to nothing, and most recent language models have no biases to train.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, Base, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """There is nothing to set. It wants a learning rate of 1e-4 to 1e-2, and layers that have a bias, as BERT's do."""

    def build(self, shape: Shape) -> "BitFitAdapter":
        """Make the adapter of one layer. Raises UsageError if the layer has no bias."""
        if not shape.bias:
            raise UsageError(
                "BitFit has nothing to train: the layer has no bias",
                why="it learns changes of biases and of nothing else",
                fix="target layers that have a bias, or take another method",
            )
        return BitFitAdapter(self, shape)


@final
class BitFitAdapter(AbstractAdapter):
    """The change of one layer's bias."""

    ROLES: ClassVar[Mapping[str, str]] = {"bias": "bias"}

    def __init__(self, config: BitFit, shape: Shape) -> None:
        super().__init__()
        self.config = config
        self.bias = nn.Parameter(torch.empty(shape.out_features))

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Add the change to the frozen layer's output."""
        y = base.frozen(x)
        return y + base.channels(self.bias).to(y.dtype)

    def merge(self, weight: Tensor) -> Tensor:
        """Leave the matrix as it is."""
        return weight

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        """Add the change in the dtype of `bias`."""
        return bias if bias is None else bias + self.bias.to(bias.dtype)


METHOD = BitFit
