"""MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning. Jiang et al. 2024, https://arxiv.org/abs/2405.12130

    W' = W + ΔW        ΔW x = decompress(M·compress(x))        M: (k, k) starts at 0, k = floor(sqrt((in + out) r))

One square matrix with at most the parameters of LoRA's A and B of rank r, and a change of rank far above r. x is cut
into n = ceil(in/k) groups of k, the last filled up with the first entries of x again, as in the authors' code.

    rotation   (their type 6) group i is turned by RoPE's rotation for position i, M is applied to each, and the n
               results stand one after the other: ΔW is block-diagonal with blocks M·R_i. It is cut at out, or starts
               over where out is longer; where out is shorter, the groups beyond it take no part, as in their code.
    sharing    (their type 1) the groups are added up, M is applied to the sum, and the result is repeated until out.

Both are linear, so it merges.

Departures from the paper: embeddings are refused. The authors' code rounds k, this takes the floor that the paper
gives, so that M never has more parameters than LoRA; rotation takes the next lower even k.

When: something is to be memorized (continued pretraining, facts), for which a low rank is too little; elsewhere its
authors find it as good as LoRA. It costs more work than LoRA of as many parameters, for a square layer k/2r times.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Base, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ._dense import recomputed
from ._factors import check, dropout


@dataclass(frozen=True, kw_only=True)
class MoRA:
    """A square matrix between two fixed maps. It wants a learning rate of 1e-4 to 1e-3, more than LoRA's at high ranks.

    r: rank of the LoRA that has as many parameters
    dropout: on the input
    variant: rotation, the authors' choice for small r, or sharing, theirs for large r
    """

    r: int = 8
    dropout: float = 0.0
    variant: Literal["rotation", "sharing"] = "rotation"

    def __post_init__(self) -> None:
        check(self.r, None, self.dropout)
        if self.variant not in ("rotation", "sharing"):
            raise UsageError(f"there is no variant {self.variant!r}", fix="there are: rotation, sharing")

    def at(self, r: int, alpha: float | None) -> "MoRA":
        """Give the same with another rank; there is no alpha."""
        return replace(self, r=r)

    def side(self, shape: Shape) -> int:
        """Give k for a layer. Raises UsageError if it is below 2."""
        k = math.isqrt((shape.in_features + shape.out_features) * self.r)
        k -= k % 2 if self.variant == "rotation" else 0
        if k < 2:
            raise UsageError(
                f"MoRA's matrix would have the side {k}",
                why=f"the layer is {shape.out_features} x {shape.in_features} and r is {self.r}",
                fix="raise r, or leave this layer out with exclude_modules",
            )
        return k

    def build(self, shape: Shape) -> "MoRAAdapter":
        """Make the adapter of one layer. Raises UsageError for an embedding."""
        if shape.one_hot:
            raise UsageError(
                "MoRA cannot adapt an embedding",
                why="the groups of inputs that share a change would be groups of unrelated tokens",
                fix="target linear layers, or take LoRA",
            )
        return MoRAAdapter(self, shape)


@final
class MoRAAdapter(AdditiveAdapter):
    """The square matrix of one layer."""

    ROLES: ClassVar[Mapping[str, str]] = {"mora_M": "other"}
    cos: Tensor
    sin: Tensor

    def __init__(self, config: MoRA, shape: Shape) -> None:
        super().__init__()
        self.config, self.shape, self.k = config, shape, config.side(shape)
        self.mora_M = nn.Parameter(torch.empty(self.k, self.k))
        self.dropout = dropout(config.dropout)
        self.groups = -(-shape.in_features // self.k)
        if config.variant == "rotation":
            self.groups = min(self.groups, -(-shape.out_features // self.k))
        frequencies = 10000 ** -(torch.arange(0, self.k // 2, device="cpu").double() * 2 / self.k)
        angles = torch.outer(torch.arange(self.groups, device="cpu").double(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer: M zero."""
        nn.init.zeros_(self.mora_M)

    def delta_weight(self) -> Tensor:
        """Give the change, (out, in), by its definition as a block matrix."""
        return self._matrix(self.mora_M)

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Compress, apply M and decompress, in the dtype the layer computes in."""
        x = self.dropout(x)
        if not base.VECTORS:
            return recomputed(lambda x, M: base.project(x, self._matrix(M).to(x.dtype)), x, self.mora_M)
        groups = self._filled(x).unflatten(-1, (self.groups, self.k))
        if self.config.variant == "rotation":
            cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
            first, second = groups.chunk(2, -1)
            groups = groups * cos + torch.cat([-second, first], -1) * sin
        else:
            groups = groups.sum(-2)
        return self._repeated(F.linear(groups, self.mora_M.to(x.dtype)).flatten(x.dim() - 1))

    def _filled(self, x: Tensor) -> Tensor:
        """Cut or fill the last dimension to the groups' length, from the beginning again."""
        length = self.groups * self.k
        times = -(-length // self.shape.in_features)
        return torch.cat([x] * times, -1)[..., :length] if times > 1 else x[..., :length]

    def _repeated(self, y: Tensor) -> Tensor:
        """Cut the last dimension at out, or start over until out."""
        times = -(-self.shape.out_features // y.shape[-1])
        return torch.cat([y] * times, -1)[..., : self.shape.out_features]

    def _matrix(self, M: Tensor) -> Tensor:
        if self.config.variant == "rotation":
            left, right = (M * self.sin[:, None]).chunk(2, -1)  # M R_i = M cos_i + M sin_i J, J: (u, v) -> (-v, u)
            blocks = M * self.cos[:, None] + torch.cat([right, -left], -1)
            square = torch.block_diag(*blocks)
        else:
            square = M.repeat(1, self.groups)
        rows = self._repeated(square.T).T
        full = rows.new_zeros(self.shape.out_features, self.shape.in_features)
        columns = torch.arange(square.shape[1], device=M.device) % self.shape.in_features
        return full.index_add(1, columns, rows)


METHOD = MoRA
