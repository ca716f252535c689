"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation. Huang et al., ICLR 2025,
https://openreview.net/forum?id=TwJrTz9cRS

    W' = W + W ⊙ (B·A)        A: (r, in)   B: (out, r) starts at 0

Every entry of W gets its own factor 1 + (B A)_ij: the change has up to the rank of W times r, at LoRA's number of
parameters. There is no scale, as in the authors' code and PEFT.

Memory: W ⊙ (B A) is made in every pass, as large as W, for one layer at a time; from the forward to the backward pass
only x, A and B are kept. Of an embedding nothing of its size is made: the rows that are looked up are multiplied.

Departures from the paper: none. Embeddings start the other way round, A zero and B normal, as LoRA's do here and in
PEFT. PEFT 0.21 builds every layer with `r` whatever `rank_pattern` says, so it refuses directories of unequal ranks.

When: LoRA's rank is what limits and the time is there. In training a layer takes about three times as long as frozen,
for the gradient of W ⊙ (B A) is as large as W's, and a 4-bit W is dequantized once more in every pass; where W is nearly
zero it cannot learn anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from ..core.adapter import AbstractAdapter, Base, PeftFormat, Shape
from ..core.statistics import Statistics
from ._dense import recomputed
from ._factors import check, dropout, factors, start


@dataclass(frozen=True, kw_only=True)
class HiRA:
    """r: rank of B A. dropout: on the input of what is added."""

    r: int = 32
    dropout: float = 0.0

    PEFT: ClassVar = PeftFormat(
        "HIRA",
        tensors={"hira_A": "hira_A", "hira_B": "hira_B"},
        fields={"r": "r", "dropout": "hira_dropout"},
        ignored={"init_weights": True},
    )

    def __post_init__(self) -> None:
        check(self.r, None, self.dropout)

    def at(self, r: int, alpha: float | None) -> "HiRA":
        """Give the same with another rank; there is no alpha."""
        return replace(self, r=r)

    def build(self, shape: Shape) -> "HiRAAdapter":
        """Make the adapter of one layer."""
        return HiRAAdapter(self, shape)


@final
class HiRAAdapter(AbstractAdapter):
    """The factors A and B of one layer."""

    ROLES: ClassVar[Mapping[str, str]] = {"hira_A": "A", "hira_B": "B"}
    FAST_IN_EMBEDDING: ClassVar[str] = "A"

    def __init__(self, config: HiRA, shape: Shape) -> None:
        super().__init__()
        self.config, self.one_hot = config, shape.one_hot
        self.hira_A, self.hira_B = factors(shape, config.r)
        self.dropout = dropout(config.dropout)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Fill A Kaiming-uniform and B with zero."""
        start(self.hira_A, self.hira_B, "kaiming", base, scale=1.0, one_hot=self.one_hot)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Add x̃ (W ⊙ B A)^T, x̃ = dropout(x), to the frozen layer's output."""
        y = base.frozen(x)
        if x.is_floating_point():
            added = recomputed(
                lambda x, A, B: base.project(x, _modulated(base.matrix().to(x.dtype), A, B)),
                self.dropout(x),
                self.hira_A,
                self.hira_B,
            )
        else:
            added = y * base.mix(base.project(x, self.hira_A), self.hira_B).to(y.dtype)
        return y + added.to(y.dtype)

    def merge(self, weight: Tensor) -> Tensor:
        """Give W + W ⊙ (B A) in the dtype of `weight`."""
        return weight + _modulated(weight, self.hira_A, self.hira_B)


def _modulated(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Give W ⊙ (B A), the product in PEFT's order, so that it has the same bits."""
    return weight * (A.T @ B.T).T.to(weight.dtype)


METHOD = HiRA
