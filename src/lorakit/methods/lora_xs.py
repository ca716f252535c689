"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters. Bałazy et al. 2024,
https://arxiv.org/abs/2405.17604

    W' = W + s·B·R·A        A = S_r V_r^T: (r, in)   B = U_r: (out, r)   R: (r, r) starts at 0   s = alpha/r

for the truncated singular value decomposition W = U S V^T. A and B are frozen, only R is trained: r^2 numbers a layer,
whatever its size.

A and B are saved. They could be made from W again, but not the same: the signs of singular vectors, and the vectors
themselves where singular values lie close together, depend on the library, its version, the processor and the number
of threads, and R means nothing in another basis. So a file is as large as LoRA's; what is small is what is trained.

Departures from the paper: R starts at zero, so that the start is the base model bit for bit; `r_std=1e-5` is the
paper's. A layer with fewer than r singular values gets as many as it has.

When: very many adapters are trained, or the optimizer's memory must vanish: r^2 numbers a layer learn. It costs the
decomposition of every W at the start, and it can only move W within its own largest directions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Base, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ..kernels.low_rank import LowRank
from ._factors import alpha_or_default, check, dropout, factors, scaling


@dataclass(frozen=True, kw_only=True)
class LoRAXS:
    """A trained map between the largest singular directions of W. It wants a learning rate of 1e-4 to 1e-2.

    r: rank, and the side of R
    alpha: scale, 2r if not given
    dropout: on the input of A
    r_std: deviation of R at the start
    niter: power iterations of a randomized decomposition, 0 for the exact one, which is slow for large matrices
    """

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    r_std: float = 0.0
    niter: int = 0

    def __post_init__(self) -> None:
        check(self.r, self.alpha, self.dropout)
        if not 0 <= self.r_std <= 1:
            raise UsageError(f"r_std must be in [0, 1], not {self.r_std}")
        if not 0 <= self.niter <= 100:
            raise UsageError(f"niter must be from 0 to 100, not {self.niter}")

    def at(self, r: int, alpha: float | None) -> "LoRAXS":
        """Give the same with another rank and alpha."""
        return replace(self, r=r, alpha=alpha)

    def build(self, shape: Shape) -> "LoRAXSAdapter":
        """Make the adapter of one layer; its own config has the rank that the layer allows and alpha as a number."""
        r = min(self.r, shape.out_features, shape.in_features)
        return LoRAXSAdapter(replace(self, r=r, alpha=alpha_or_default(r, self.alpha)), shape)


@final
class LoRAXSAdapter(AdditiveAdapter):
    """The frozen factors of one layer and R."""

    ROLES: ClassVar[Mapping[str, str]] = {"lora_A": "frozen", "lora_B": "frozen", "lora_R": "other"}
    scale: Tensor

    def __init__(self, config: LoRAXS, shape: Shape) -> None:
        super().__init__()
        self.config = config
        self.lora_A, self.lora_B = (factor.requires_grad_(False) for factor in factors(shape, config.r))
        self.lora_R = nn.Parameter(torch.empty(config.r, config.r))
        self.dropout = dropout(config.dropout)
        scale = scaling(config.r, alpha_or_default(config.r, config.alpha), stabilized=False)
        self.register_buffer("scale", scale, persistent=False)

    @torch.no_grad()
    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Decompose W, and start R at zero or nearly so."""
        r, W = self.config.r, base.matrix().to(self.lora_A.dtype)
        if self.config.niter:
            most = min(W.shape)
            U, S, V = torch.svd_lowrank(W, q=min(r + 10, most), niter=self.config.niter)
            Vh = V.T
        else:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        self.lora_B.copy_(U[:, :r])
        self.lora_A.copy_(S[:r, None] * Vh[:r])
        if self.config.r_std:
            nn.init.normal_(self.lora_R, std=self.config.r_std)
        else:
            nn.init.zeros_(self.lora_R)

    def delta_weight(self) -> Tensor:
        """Give s·B·R·A."""
        return self.scale * (self.lora_B @ self.lora_R @ self.lora_A)

    def low_rank(self, base: Base) -> LowRank:
        """Give A, B·R and s. A gets no gradient, so the input is not kept for the backward pass."""
        return LowRank(
            self.lora_A, self.lora_B @ self.lora_R, self.scale, self.config.dropout if self.training else 0.0
        )

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give s·B(R(A(dropout(x)))), in the dtype the layer computes in."""
        A, B, R = self.lora_A, self.lora_B, self.lora_R
        if x.is_floating_point():  # token ids are not dropped
            A, B, R, x = A.to(x.dtype), B.to(x.dtype), R.to(x.dtype), self.dropout(x)
        return base.mix(base.mix(base.project(x, A), R), B) * self.scale.to(B.dtype)


METHOD = LoRAXS
