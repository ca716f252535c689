"""The parallel and the scaled parallel adapter. He et al. 2021, https://arxiv.org/abs/2110.04366

    y' = W x + b + s·(U·f(D·x + c) + e)        D: (m, in)   U: (out, m)   c: (m,)   e: (out,)   s: scale (1: not scaled)

Like LoRA it reads the layer's input, with a nonlinearity in between. The paper puts it beside the whole feed-forward
network (from its input to its output), which is more than one layer. Beside one linear layer the nearest placements are

    the feed-forward network's second layer   BERT "output.dense", Llama "down_proj", GPT-2 "mlp.c_proj"
    its first layer                           BERT "intermediate.dense", Llama "up_proj", GPT-2 "mlp.c_fc"
    attention (the paper's other variant)     BERT "attention.output.dense", Llama "o_proj", GPT-2 "attn.c_proj"

Departures from the paper: the placement, as said. D starts Kaiming-uniform and U at zero as there, so the start is the
base model to the last bit. It cannot be merged (there is a nonlinearity in it).

When: a nonlinear change of the feed-forward network is wanted and LoRA's rank is not the limit. It costs a bottleneck
of width m in every pass, for good: it cannot be merged.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, Base, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ._bottleneck import ACTIVATIONS, Activation, check, refuse_merging


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """A bottleneck beside the layer.

    bottleneck: width m
    scale: factor s of what is added; 1 for the parallel adapter that is not scaled
    activation: nonlinearity f
    """

    bottleneck: int = 512
    scale: float = 4.0
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        check(self.activation, bottleneck=self.bottleneck)
        if not math.isfinite(self.scale) or self.scale == 0:
            raise UsageError(f"scale must be a number other than 0, not {self.scale}")

    def build(self, shape: Shape) -> "ParallelAdapter":
        """Make the adapter of one layer."""
        return ParallelAdapter(self, shape)


@final
class ParallelAdapter(AbstractAdapter):
    """The bottleneck beside one layer."""

    MERGEABLE: ClassVar[bool] = False
    ROLES: ClassVar[Mapping[str, str]] = {"down": "A", "down_bias": "bias", "up": "B", "up_bias": "bias"}
    scale: Tensor

    def __init__(self, config: Parallel, shape: Shape) -> None:
        super().__init__()
        self.config, self.activation, m = config, ACTIVATIONS[config.activation], config.bottleneck
        self.down, self.down_bias = nn.Parameter(torch.empty(m, shape.in_features)), nn.Parameter(torch.empty(m))
        self.up, self.up_bias = (
            nn.Parameter(torch.empty(shape.out_features, m)),
            nn.Parameter(torch.empty(shape.out_features)),
        )
        self.register_buffer("scale", torch.tensor(config.scale), persistent=False)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Fill D with variance 1/(3 in), the rest with zero: the start is the base layer."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        for parameter in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Run the layer and add the scaled bottleneck of its input."""
        y = base.frozen(x)
        down, c, up, e = (p.to(y.dtype) for p in (self.down, self.down_bias, self.up, self.up_bias))
        hidden = self.activation(base.project(x, down) + base.channels(c))
        return y + (base.mix(hidden, up) + base.channels(e)) * self.scale.to(y.dtype)

    def merge(self, weight: Tensor) -> Tensor:
        """Raise UsageError."""
        refuse_merging()


METHOD = Parallel
