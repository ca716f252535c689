"""X-LoRA: trained LoRAs, mixed anew for each token and layer. Buehler and Buehler 2024, https://arxiv.org/abs/2402.07148

    y' = W x + b + sum_i λ_i B_i A_i x       λ = R x + c, for each token, or its softmax
    A: (n, r, in)   B: (n, out, r) the experts, frozen, their scales in B   R: (n, in), c: (n,) start at 0

The experts come from adapters that were trained before: LoRAs of any rank for the same base, each on layers of its own
choice. They are copied in, with zeros where one has a lower rank or no adapter on a layer, and saved with the mixture,
which needs none of their files afterwards. Start it from adapters that are on the model with `lk.mixture`, or name
their directories in `adapters`.

Departures from the paper: there one network on the last hidden state of a first pass without adapters gives the scalings
of all layers for a second pass; here each layer has a router of its own, linear, on its own input, and there is one
pass. λ starts at 0, which is the base model; with `softmax` (the authors' default) at 1/n, which is the mean of the experts.

It cannot be merged: each token has a matrix of its own.

When: there are good adapters for parts of a task, and little data for the whole. It trains num_experts·(in + 1) numbers
a layer, and costs the work of all adapters together in every pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, Base, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ._experts import channel_dim, mix_experts


@dataclass(frozen=True, kw_only=True)
class XLoRA:
    """A router over trained LoRAs, which stay as they are. It adapts the layers that they adapt.

    adapters: directories of the LoRAs, for the same base
    softmax: make the scalings of a token add up to 1
    num_experts: number of LoRAs; read from them
    r: largest of their ranks; read from them
    """

    adapters: Sequence[str] = ()
    softmax: bool = False
    num_experts: int = 2
    r: int = 16

    NEEDS: ClassVar = frozenset({"experts"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", tuple(self.adapters))
        if len(self.adapters) == 1:
            raise UsageError("adapters names one LoRA; a mixture needs at least two")
        if self.num_experts < 1 or self.r < 1:
            raise UsageError(f"num_experts and r must be at least 1, not {self.num_experts} and {self.r}")

    def build(self, shape: Shape) -> "XLoRAAdapter":
        """Make the adapter of one layer."""
        return XLoRAAdapter(self, shape)


@final
class XLoRAAdapter(AbstractAdapter):
    """The experts and the router of one layer."""

    MERGEABLE: ClassVar[bool] = False
    ROLES: ClassVar[Mapping[str, str]] = {"router": "other", "shift": "bias", "lora_A": "frozen", "lora_B": "frozen"}
    config: XLoRA

    def __init__(self, config: XLoRA, shape: Shape) -> None:
        super().__init__()
        self.config = config
        n, r = config.num_experts, config.r
        self.router, self.shift = nn.Parameter(torch.empty(n, shape.in_features)), nn.Parameter(torch.empty(n))
        self.lora_A = nn.Parameter(torch.empty(n, r, shape.in_features), requires_grad=False)
        self.lora_B = nn.Parameter(torch.empty(n, shape.out_features, r), requires_grad=False)

    @torch.no_grad()
    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Copy the experts and start the router at zero. Raises UsageError if no experts are given."""
        if statistics is None or statistics.experts is None:
            raise UsageError(
                "X-LoRA mixes trained LoRAs, and none are given",
                why="its experts are frozen, so there is nothing for a router to choose from",
                fix="lk.mixture(model, [names of LoRAs on the model]), or method.adapters: [their directories]",
            )
        A, B = statistics.experts
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        self.router.zero_()
        self.shift.zero_()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Run the layer and add the experts, each scaled for each token."""
        y = base.frozen(x)
        A, B, router = self.lora_A, self.lora_B, self.router
        if x.is_floating_point():
            A, B, router = A.to(x.dtype), B.to(x.dtype), router.to(x.dtype)
        dim = channel_dim(base, self.shift)
        scalings = base.project(x, router)
        scalings = scalings + base.channels(self.shift).to(scalings.dtype)
        if self.config.softmax:
            scalings = scalings.to(torch.promote_types(scalings.dtype, torch.float32)).softmax(dim)
        return y + mix_experts(x, base, A, B, scalings, dim).to(y.dtype)

    def merge(self, weight: Tensor) -> Tensor:
        """Raise UsageError."""
        raise UsageError(
            "an X-LoRA cannot be merged",
            why="its scalings are another for each token, so no one matrix computes the same",
            fix="keep the adapter beside the model, or merge one of the LoRAs that it mixes",
        )


METHOD = XLoRA
