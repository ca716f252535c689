"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al. 2024, https://arxiv.org/abs/2402.09353

    W' = diag(m / ‖V‖)·V        V = W + s·B·A   ‖V‖: (out,) norms of the rows   m: (out,) starts at ‖W‖

m learns the length of each row, B A its direction. As in the paper's section 4.3 the norm is a constant to the
gradient.

The norm is computed from its parts, so that V (out, in) never exists in the forward pass:

    ‖V_i‖² = ‖W_i‖² + 2 s B_i·(A W^T)_i + s² B_i (A A^T) B_i^T

Of it, W A^T is r numbers a row; ‖W_i‖² is read off W each time rather than kept, so that it is right for any W.

Departures from the paper: none. Dropout, as in the authors' code and PEFT, is on the input of all that the adapter
adds: in training y = W x + (g - 1) W x̃ + g s B A x̃ for g = m / ‖V‖ and x̃ = dropout(x), one mask for both as in PEFT.

When: LoRA of a small rank falls short of full fine-tuning. It costs the norms of all rows, read off W in every
forward pass, and out numbers a layer more than LoRA; merged it costs nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, Base, PeftFormat, Shape
from ..core.statistics import Statistics
from ..kernels.low_rank import LowRank
from ._factors import alpha_or_default, check, check_starts_at_zero, dropout, factors, scaling, start

AT_ONCE = 1 << 22
"""Entries of W whose squares are summed at once: torch converts a bf16 W to the dtype of the sum before, on a CPU."""


@dataclass(frozen=True, kw_only=True)
class DoRA:
    """LoRA for the direction of each row, and a trained length.

    r: rank
    alpha: scale, 2r if not given
    dropout: on the input of what is added
    rank_stabilized: divide alpha by sqrt(r) instead of r
    init: start value of A and B; one that starts from factors of W is refused
    """

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    init: str = "kaiming"

    PEFT: ClassVar = PeftFormat(
        "LORA",
        tensors={"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
        fields={"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rank_stabilized": "use_rslora"},
        constants={"use_dora": True},
    )

    def __post_init__(self) -> None:
        check(self.r, self.alpha, self.dropout)
        check_starts_at_zero(self.init, "DoRA", " for which DoRA has no place")

    def at(self, r: int, alpha: float | None) -> "DoRA":
        """Give the same with another rank and alpha."""
        return replace(self, r=r, alpha=alpha)

    def build(self, shape: Shape) -> "DoRAAdapter":
        """Make the adapter of one layer; its own config has alpha as a number."""
        return DoRAAdapter(replace(self, alpha=alpha_or_default(self.r, self.alpha)), shape)


@final
class DoRAAdapter(AbstractAdapter):
    """The factors and the magnitudes of one layer."""

    ROLES: ClassVar[Mapping[str, str]] = {"lora_A": "A", "lora_B": "B", "magnitude": "magnitude"}
    FAST_IN_EMBEDDING: ClassVar[str] = "A"
    scale: Tensor

    def __init__(self, config: DoRA, shape: Shape) -> None:
        super().__init__()
        self.config, self.one_hot = config, shape.one_hot
        self.lora_A, self.lora_B = factors(shape, config.r)
        self.magnitude = nn.Parameter(torch.empty(shape.out_features))
        self.dropout = dropout(config.dropout)
        scale = scaling(config.r, alpha_or_default(config.r, config.alpha), config.rank_stabilized)
        self.register_buffer("scale", scale, persistent=False)

    @torch.no_grad()
    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Fill A and B by the init, and m with the norms of the rows."""
        scale, init = float(self.scale), self.config.init
        start(self.lora_A, self.lora_B, init, base, scale=scale, one_hot=self.one_hot, statistics=statistics)
        self.magnitude.copy_(self.norm(base.matrix()))

    @torch.no_grad()
    def norm(self, weight: Tensor) -> Tensor:
        """Give ‖V‖ (out,) for W (out, in), never 0, in the dtype of m. No tensor of the size of W is made."""
        A, B, s = self.lora_A, self.lora_B, self.scale
        slices = weight.split(max(1, AT_ONCE // weight.shape[1]))
        own = torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=B.dtype) for rows in slices]).square()
        cross = (weight @ A.to(weight.dtype).T).to(B.dtype)
        squared = own + 2 * s * (B * cross).sum(1) + s.square() * (B @ (A @ A.T) * B).sum(1)
        return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()

    def low_rank(self, base: Base) -> LowRank | None:
        """Give A, B, s and the gain m / ‖V‖. Dropout is on what is added to the frozen output, so it has no such form."""
        if self.training and self.config.dropout:
            return None
        return LowRank(self.lora_A, self.lora_B, self.scale, gain=self.magnitude / self.norm(base.matrix()))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Add to the frozen layer's output what it lacks to g W x + g s B A x, without its bias."""
        y = base.frozen(x)
        A, B = self.lora_A, self.lora_B
        if x.is_floating_point():
            A, B = A.to(x.dtype), B.to(x.dtype)
        if x.is_floating_point() and self.training and self.config.dropout:
            x = self.dropout(x)
            linear = base.linear(x)
        else:
            linear = base.without_bias(y)
        gain = base.channels((self.magnitude / self.norm(base.matrix())).to(y.dtype))
        low = base.mix(base.project(x, A), B).to(y.dtype)
        return y + ((gain - 1) * linear + gain * low * self.scale.to(y.dtype))

    def merge(self, weight: Tensor) -> Tensor:
        """Give diag(m / ‖V‖) V in the dtype of `weight`."""
        V = weight + (self.scale * (self.lora_B @ self.lora_A)).to(weight.dtype)
        return (self.magnitude / self.norm(weight)).to(weight.dtype)[:, None] * V


METHOD = DoRA
