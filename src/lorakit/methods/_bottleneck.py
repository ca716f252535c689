"""The bottleneck of the adapters that came before LoRA: down, nonlinearity, up. It cannot be folded into a matrix."""

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, NoReturn, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, Base, Method, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics

Activation = Literal["relu", "gelu", "silu"]
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
DOWN_STD = 0.01


def check(activation: str, **positive: float) -> None:
    """Raise UsageError for an activation that is not there or a size that is not positive."""
    if activation not in ACTIVATIONS:
        raise UsageError(f"there is no activation {activation!r}", fix=f"there are: {', '.join(ACTIVATIONS)}")
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise UsageError(f"{name} must be positive, not {value}")


def refuse_merging() -> NoReturn:
    """Raise UsageError: no matrix does what a nonlinear function does."""
    raise UsageError(
        "a bottleneck adapter cannot be merged",
        why="there is a nonlinearity between its two matrices, so no single matrix computes the same",
        fix="keep it beside the model, or train LoRA, which can be merged",
    )


@final
class SerialBottleneck(AbstractAdapter):
    """y + U f(D y + c) + e for the layer's output y: D (m, out), c (m,), U (out, m), e (out,)."""

    MERGEABLE: ClassVar[bool] = False
    ROLES: ClassVar[Mapping[str, str]] = {"down": "A", "down_bias": "bias", "up": "B", "up_bias": "bias"}

    def __init__(self, config: Method, shape: Shape, size: int, activation: str) -> None:
        super().__init__()
        self.config, self.activation = config, ACTIVATIONS[activation]
        out = shape.out_features
        self.down, self.down_bias = nn.Parameter(torch.empty(size, out)), nn.Parameter(torch.empty(size))
        self.up, self.up_bias = nn.Parameter(torch.empty(out, size)), nn.Parameter(torch.empty(out))

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Fill D with a normal of deviation 0.01, cut at two of them, and the rest with zero, which is the base layer."""
        nn.init.trunc_normal_(self.down, std=DOWN_STD, a=-2 * DOWN_STD, b=2 * DOWN_STD)
        for parameter in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Run the layer and add the bottleneck of its output."""
        y = base.frozen(x)
        down, c, up, e = (p.to(y.dtype) for p in (self.down, self.down_bias, self.up, self.up_bias))
        return y + (base.mix(self.activation(base.mix(y, down) + base.channels(c)), up) + base.channels(e))

    def merge(self, weight: Tensor) -> Tensor:
        """Raise UsageError."""
        refuse_merging()
