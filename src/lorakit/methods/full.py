"""Full fine-tuning of the targeted matrices: what adapters are measured against. Hu et al. 2021, section 5.1,
https://arxiv.org/abs/2106.09685

    W' = W + D        D: (out, in) starts at 0

Trained is the change D and not a copy of W. So the start is the base model bit for bit, a base in bf16 or 4 bits can be
trained without losing small steps, and D can be looked at, merged and cut to low rank like any other change. Without
weight decay the optimizer takes the same steps either way; with it D is pulled to 0, that is W' to W.

Memory: D is held in fp32, so a trained weight costs 16 bytes beside the base (D 4, its gradient 4, AdamW's two moments
8), and a second product of the layer's size in the forward pass. All linear layers of SmolLM2-135M (106 million
weights) take 1.7 GB, of an 8-billion-parameter model 112 GB. The file has 4 bytes a weight.

Departures from the paper: biases, norms and the layers not targeted stay frozen. `modules_to_save` trains a module
whole.

When: the measure for all others is wanted, or the task is far from what the model knows and the memory is there. It
costs 16 bytes a weight while it trains and a file as large as the layers in fp32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Base, Shape
from ..core.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Full:
    """There is nothing to set. It takes 16 bytes a trained weight, and wants about a tenth of LoRA's learning rate."""

    def build(self, shape: Shape) -> "FullAdapter":
        """Make the change of one layer's matrix."""
        return FullAdapter(self, shape)


@final
class FullAdapter(AdditiveAdapter):
    """The change of one layer's matrix."""

    ROLES: ClassVar[Mapping[str, str]] = {"change": "base"}

    def __init__(self, config: Full, shape: Shape) -> None:
        super().__init__()
        self.config = config
        self.change = nn.Parameter(torch.empty(shape.out_features, shape.in_features))

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer."""
        nn.init.zeros_(self.change)

    def delta_weight(self) -> Tensor:
        """Give D."""
        return self.change

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give D x, in the dtype the layer computes in."""
        return base.project(x, self.change.to(x.dtype) if x.is_floating_point() else self.change)


METHOD = Full
