"""LoRA-FA: Memory-efficient Low-rank Adaptation with frozen A. Zhang et al. 2023, https://arxiv.org/abs/2308.03303

    W' = W + s·B·A        A: (r, in) random, frozen   B: (out, r) zero, trained   s = alpha/r, or alpha/sqrt(r)

The gradient of B is G' s (A x)^T: of the input, only A x (r numbers a token) has to be kept for it. Autograd keeps the
input of a linear map for the gradient of its matrix and for nothing else, so that with A frozen x is kept neither for A
nor for W, and no function of our own is needed (a convolution keeps its input also for a frozen kernel: there only A's
state is saved).

Departures from the paper: none in the map. There is no dropout, whose mask is as large as the input that need not be
kept. An embedding starts with A random too, of variance 1/r, for LoRA's start there (A zero) would leave a frozen A at
nothing.

When: the activations of long rows do not fit, for the inputs of the layers need not be kept. It costs what the frozen
A cannot see: the change stays within r random directions of the input, so give it a higher rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from ..core.adapter import AdditiveAdapter, Base, PeftFormat, Shape
from ..core.chain import Chain
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ..kernels.low_rank import LowRank
from ._factors import alpha_or_default, check, factors, scaling, start, starts_off_zero, starts_zero


@dataclass(frozen=True, kw_only=True)
class LoRAFA:
    """LoRA with A frozen. The change keeps A's row space, so it wants a higher rank or learning rate than LoRA.

    r: rank
    alpha: scale, 2r if not given
    rank_stabilized: divide alpha by sqrt(r) instead of r
    init: start value of A and B; one that starts A at zero is refused
    """

    r: int = 16
    alpha: float | None = None
    rank_stabilized: bool = False
    init: str = "kaiming"

    PEFT: ClassVar = PeftFormat(
        "LORA",
        tensors={"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
        fields={"r": "r", "alpha": "lora_alpha", "rank_stabilized": "use_rslora"},
        constants={"use_dora": False},
        ignored={"lora_dropout": 0.0},
        only_with_side_file=True,
    )

    def __post_init__(self) -> None:
        check(self.r, self.alpha, dropout=0.0)
        if starts_zero(self.init) == "A":
            raise UsageError(
                f"init {self.init!r} and LoRA-FA do not go together",
                why="it starts A at zero, and A is frozen here: B A would stay zero",
                fix="take an init that starts B at zero, such as kaiming",
            )

    def at(self, r: int, alpha: float | None) -> "LoRAFA":
        """Give the same with another rank and alpha."""
        return replace(self, r=r, alpha=alpha)

    def build(self, shape: Shape) -> AdditiveAdapter:
        """Make the adapter of one layer; its own config has alpha as a number."""
        adapter = LoRAFAAdapter(replace(self, alpha=alpha_or_default(self.r, self.alpha)), shape)
        off = starts_off_zero(self.init) and not shape.one_hot
        return Chain(adapter, start_off=True) if off else adapter


@final
class LoRAFAAdapter(AdditiveAdapter):
    """The factors of one layer: A frozen, B trained."""

    ROLES: ClassVar[Mapping[str, str]] = {"lora_A": "frozen", "lora_B": "B"}
    scale: Tensor

    def __init__(self, config: LoRAFA, shape: Shape) -> None:
        super().__init__()
        self.config, self.one_hot = config, shape.one_hot
        self.lora_A, self.lora_B = factors(shape, config.r)
        self.lora_A.requires_grad_(False)
        scale = scaling(config.r, alpha_or_default(config.r, config.alpha), config.rank_stabilized)
        self.register_buffer("scale", scale, persistent=False)

    @torch.no_grad()
    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Fill A and B by the init."""
        if self.one_hot:
            self.lora_A.normal_(std=self.config.r**-0.5)
            self.lora_B.zero_()
        else:
            scale, init = float(self.scale), self.config.init
            start(self.lora_A, self.lora_B, init, base, scale=scale, one_hot=False, statistics=statistics)

    def delta_weight(self) -> Tensor:
        """Give s·B·A."""
        return self.scale * (self.lora_B @ self.lora_A)

    def low_rank(self, base: Base) -> LowRank:
        """Give A, B and s."""
        return LowRank(self.lora_A, self.lora_B, self.scale)

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give s·B(A x), in the dtype the layer computes in."""
        A, B = self.lora_A, self.lora_B
        if x.is_floating_point():
            A, B = A.to(x.dtype), B.to(x.dtype)
        return base.mix(base.project(x, A), B) * self.scale.to(B.dtype)


METHOD = LoRAFA
