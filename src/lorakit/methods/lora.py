"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021, https://arxiv.org/abs/2106.09685
rsLoRA, the scale alpha/sqrt(r). Kalajdzievski 2023, https://arxiv.org/abs/2312.03732

    W' = W + s·B·A        A: (r, in)   B: (out, r)   s = alpha/r, or alpha/sqrt(r) if rank_stabilized

Departure from the paper: A starts Kaiming-uniform as in the authors' code, not Gaussian; `init="gaussian"` is the paper's.

When: first. It costs r (in + out) numbers a layer, their work until they are merged, and nothing after that. The
learning rate is about ten times that of full fine-tuning; the rank matters less than adapting all linear layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from ..core.adapter import AdditiveAdapter, Base, PeftFormat, Shape
from ..core.chain import Chain
from ..core.statistics import Statistics
from ..kernels.low_rank import LowRank
from ._factors import alpha_or_default, check, dropout, factors, scaling, start, starts_off_zero


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """r: rank. alpha: scale, 2r if not given. dropout: on the input of A. rank_stabilized: divide alpha by sqrt(r), not by r.
    init: a file name of `init/`.
    """

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    init: str = "kaiming"

    PEFT: ClassVar = PeftFormat(
        "LORA",
        tensors={"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
        fields={"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rank_stabilized": "use_rslora"},
        constants={"use_dora": False},
    )

    def __post_init__(self) -> None:
        check(self.r, self.alpha, self.dropout)

    def at(self, r: int, alpha: float | None) -> "LoRA":
        """Give the same with another rank and alpha."""
        return replace(self, r=r, alpha=alpha)

    def build(self, shape: Shape) -> AdditiveAdapter:
        """Make the adapter of one layer; its own config has alpha as a number."""
        adapter = LoRAAdapter(replace(self, alpha=alpha_or_default(self.r, self.alpha)), shape)
        off = starts_off_zero(self.init) and not shape.one_hot
        return Chain(adapter, start_off=True) if off else adapter


@final
class LoRAAdapter(AdditiveAdapter):
    """The factors A and B of one layer."""

    ROLES: ClassVar[Mapping[str, str]] = {"lora_A": "A", "lora_B": "B"}
    FAST_IN_EMBEDDING: ClassVar[str] = "A"
    scale: Tensor

    def __init__(self, config: LoRA, shape: Shape) -> None:
        super().__init__()
        self.config, self.one_hot = config, shape.one_hot
        self.lora_A, self.lora_B = factors(shape, config.r)
        self.dropout = dropout(config.dropout)
        scale = scaling(config.r, alpha_or_default(config.r, config.alpha), config.rank_stabilized)
        self.register_buffer("scale", scale, persistent=False)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Fill A and B by the init."""
        scale = float(self.scale)
        start(
            self.lora_A, self.lora_B, self.config.init, base, scale=scale, one_hot=self.one_hot, statistics=statistics
        )

    def delta_weight(self) -> Tensor:
        """Give s·B·A."""
        return self.scale * (self.lora_B @ self.lora_A)

    def low_rank(self, base: Base) -> LowRank:
        """Give A, B and s."""
        return LowRank(self.lora_A, self.lora_B, self.scale, self.config.dropout if self.training else 0.0)

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give s·B(A(dropout(x))), in the dtype the layer computes in."""
        A, B = self.lora_A, self.lora_B
        if x.is_floating_point():  # token ids are not dropped
            A, B, x = A.to(x.dtype), B.to(x.dtype), self.dropout(x)
        return base.mix(base.project(x, A), B) * self.scale.to(B.dtype)


METHOD = LoRA
