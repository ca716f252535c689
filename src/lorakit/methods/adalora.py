"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al. 2023,
https://arxiv.org/abs/2303.10512

    W' = W + s·B·diag(E)·A        A: (r, in)   E: (r, 1) starts at 0   B: (out, r)   s = alpha / (init_r + 1e-5)

The form of a singular value decomposition, kept near one by a penalty that pulls A A^T and B^T B to the identity. While
it trains, the controller of the same name takes whole triplets (a row of A, an entry of E, a column of B) away from the
layers that need them least, by setting their entry of E to zero, until target_r per layer are left on average. What is
saved are the triplets that are left. s stays that of init_r, as in the authors' code and PEFT, and so does its 1e-5.

Departures from the paper: none in the map; those of the budget are in the controller's file.

When: it is not known which layers need the rank, and the run has some hundred steps in which the budget can fall. It
costs LoRA's memory at init_r, three times that of the factors for the scores, and a penalty in each step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Base, PeftFormat, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ..kernels.low_rank import LowRank
from ._factors import alpha_or_default, check, dropout

START_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class AdaLoRA:
    """LoRA whose ranks are allotted to the layers while it trains. When and how is set in `train.controller`.

    init_r: rank of each layer at the start
    target_r: rank at the end, on average over the layers
    alpha: scale, 2 init_r if not given
    dropout: on the input of A
    r: rank of the layers that start with less than init_r; of a saved adapter, what was left
    """

    init_r: int = 12
    target_r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    r: int | None = None

    PEFT: ClassVar = PeftFormat(
        "ADALORA",
        tensors={"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"},
        fields={"init_r": "init_r", "target_r": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        # What PEFT goes on pruning with if it trains further; it wants at least one step.
        ignored={
            "r": 8,
            "total_step": 1,
            "tinit": 0,
            "tfinal": 0,
            "deltaT": 1,
            "beta1": 0.85,
            "beta2": 0.85,
            "orth_reg_weight": 0.5,
        },
        masked=("lora_E", "init_r"),
    )

    def __post_init__(self) -> None:
        check(self.init_r, self.alpha, self.dropout)
        if self.alpha is not None and self.alpha <= 0:
            raise UsageError(f"alpha must be positive, not {self.alpha}", why="PEFT reads any other alpha as init_r")
        if not 1 <= self.target_r <= self.init_r:
            raise UsageError(f"target_r must be from 1 to init_r = {self.init_r}, not {self.target_r}")
        if self.r is not None and not 0 <= self.r <= self.init_r:
            raise UsageError(f"r must be from 0 to init_r = {self.init_r}, not {self.r}")

    def at(self, r: int | None, alpha: float | None) -> "AdaLoRA":
        """Give the same with another number of triplets. Raises UsageError for another alpha."""
        if alpha != self.alpha:
            raise UsageError(
                "alpha_pattern does not apply to AdaLoRA",
                why="it compares the scores of all layers, which their scale is part of",
            )
        return replace(self, r=r)

    def build(self, shape: Shape) -> "AdaLoRAAdapter":
        """Make the adapter of one layer; its own config has alpha and r as numbers."""
        r = self.init_r if self.r is None else self.r
        return AdaLoRAAdapter(replace(self, r=r, alpha=alpha_or_default(self.init_r, self.alpha)), shape)


@final
class AdaLoRAAdapter(AdditiveAdapter):
    """The triplets of one layer."""

    ROLES: ClassVar[Mapping[str, str]] = {"lora_A": "A", "lora_B": "B", "lora_E": "other"}
    config: AdaLoRA
    scale: Tensor
    ranknum: Tensor
    kept: Tensor
    """Which triplets (r,) the budget leaves: all, until the controller, whose checkpoint has it, says otherwise."""

    def __init__(self, config: AdaLoRA, shape: Shape) -> None:
        super().__init__()
        if config.alpha is None or config.r is None:
            raise TypeError("alpha and r must be numbers here; AdaLoRA.build makes them so")
        self.config, self.shape = config, shape
        self.lora_A = nn.Parameter(torch.empty(config.r, shape.in_features))
        self.lora_E = nn.Parameter(torch.empty(config.r, 1))
        self.lora_B = nn.Parameter(torch.empty(shape.out_features, config.r))
        self.dropout = dropout(config.dropout)
        self.register_buffer("scale", torch.tensor(config.alpha), persistent=False)
        self.register_buffer("ranknum", torch.tensor(float(config.init_r)), persistent=False)
        self.register_buffer("kept", torch.ones(config.r, dtype=torch.bool), persistent=False)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Fill A and B at random and E with zero: the start is the base layer."""
        nn.init.normal_(self.lora_A, std=START_STD)
        nn.init.normal_(self.lora_B, std=START_STD)
        nn.init.zeros_(self.lora_E)

    def delta_weight(self) -> Tensor:
        """Give s·B·diag(E)·A."""
        return (self.lora_B @ (self.lora_A * self.lora_E)) * self.scale / (self.ranknum + 1e-5)

    def low_rank(self, base: Base) -> LowRank | None:
        """Give diag(E)·A, B and s; nothing if no triplet is left."""
        A, scale = self.lora_A * self.lora_E, self.scale / (self.ranknum + 1e-5)
        return LowRank(A, self.lora_B, scale, self.config.dropout if self.training else 0.0) if len(A) else None

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give s·B(E·A(dropout(x))), in the dtype the layer computes in."""
        A, B = self.lora_A * self.lora_E, self.lora_B
        if x.is_floating_point():  # token ids are not dropped
            A, B, x = A.to(x.dtype), B.to(x.dtype), self.dropout(x)
        if not len(A):  # a convolution cannot have no channels
            return base.channels(B.new_zeros(self.shape.out_features))
        return base.mix(base.project(x, A), B) * self.scale.to(B.dtype) / (self.ranknum + 1e-5).to(B.dtype)

    @torch.no_grad()
    def compact(self) -> "AdaLoRAAdapter":
        """Give an adapter of the triplets that the budget leaves, and of those that came back since it last looked."""
        kept = self.kept | (self.lora_E != 0).squeeze(1)
        small = AdaLoRAAdapter(replace(self.config, r=int(kept.sum())), self.shape).to(self.lora_A)
        small.lora_A.copy_(self.lora_A[kept])
        small.lora_E.copy_(self.lora_E[kept])
        small.lora_B.copy_(self.lora_B[:, kept])
        return small


METHOD = AdaLoRA
