"""OFT: Orthogonal Finetuning. Qiu et al. 2023, https://arxiv.org/abs/2306.07280
On the side of the input, where no matrix of the size of W is made. Qiu et al. 2025, https://arxiv.org/abs/2506.19847

    W' = W·blockdiag(R_1 .. R_n)^T      R_i = (I - Q_i)(I + Q_i)^-1: (b, b)     Q_i^T = -Q_i     n b = in
    y = W (R^T x) + b

Only the b (b - 1) / 2 entries of each Q above its diagonal are trained, from 0. R is orthogonal, so that the neurons
(rows of W) are turned and nothing else: their lengths and the angles between them stay. An embedding's vectors are
rotated instead of its one-hot input: n b = dim, and R^T x for the vector x of a token.

With `use_cayley_neumann` R is the series (I + Q)(I - Q)^-1 = I + 2Q + 2Q² + ... cut off, as PEFT computes it: no
solve, but orthogonal only near the start. Mind the sign: it is the inverse of the exact one for the same Q.

Departures from the paper: none in the map (the paper writes W transposed, its neurons as columns); the constrained
variant (COFT), which keeps Q within a ball, is not offered. A block size that does not divide the layer's inputs is
replaced by the nearest that does, as in PEFT. PEFT before 0.18 added the series up otherwise: of its directories with
`use_cayley_neumann` PEFT itself warns, and here they mean what they mean to PEFT now. A convolution rotates what the
kernel sees at a place, which is what merging means there.

When: what the base model knows is to be disturbed as little as possible (subjects and styles in image models, a small
shift of domain), and no rank is to be chosen. It costs a rotation of every token's input, small solves in each step;
changes of the neurons' lengths are out of its reach.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, Base, PeftFormat, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ._orthogonal import cayley, on_patches, rotate


@dataclass(frozen=True, kw_only=True)
class OFT:
    """A rotation of each layer's input, block by block. Give the size of the blocks or their number, the other one as 0.

    oft_block_size: inputs that are rotated together, b
    r: number of blocks n, instead of their size
    block_share: one block for all, so that a layer has b (b - 1) / 2 parameters
    use_cayley_neumann: the cut-off series instead of the exact Cayley map
    num_cayley_neumann_terms: terms of the series; 4 are the same as 3, as in PEFT
    """

    oft_block_size: int = 32
    r: int = 0
    block_share: bool = False
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5

    PEFT: ClassVar = PeftFormat(
        "OFT",
        tensors={"oft_R": "oft_R.weight"},
        fields={
            "oft_block_size": "oft_block_size",
            "r": "r",
            "block_share": "block_share",
            "use_cayley_neumann": "use_cayley_neumann",
            "num_cayley_neumann_terms": "num_cayley_neumann_terms",
        },
        # eps belongs to COFT alone, and no layer of PEFT applies module_dropout. The version is the one since which the
        # series is this one: PEFT warns of a directory that does not say so.
        ignored={"eps": 6e-5, "module_dropout": 0.0, "init_weights": True, "peft_version": "0.18.0"},
    )

    def __post_init__(self) -> None:
        if min(self.r, self.oft_block_size) < 0 or (self.r == 0) == (self.oft_block_size == 0):
            raise UsageError(
                f"one of r and oft_block_size must be positive and the other 0, not {self.r} and {self.oft_block_size}",
                why="their product is the number of the layer's inputs",
            )
        if self.oft_block_size == 1:
            raise UsageError("oft_block_size must be at least 2", why="a single number cannot be rotated")
        if self.num_cayley_neumann_terms < 2:
            raise UsageError(
                f"num_cayley_neumann_terms must be at least 2, not {self.num_cayley_neumann_terms}",
                why="the first term is the identity, from which nothing can be learned",
            )

    def build(self, shape: Shape) -> "OFTAdapter":
        """Make the adapter of one layer."""
        return OFTAdapter(self, shape)

    def block_size(self, features: int) -> int:
        """Give b for a layer that has this many vector entries to rotate."""
        if self.r:
            return features // nearest_divisor(self.r, features)
        return nearest_divisor(self.oft_block_size, features)


def nearest_divisor(wanted: int, n: int) -> int:
    """Give the divisor of n nearest to `wanted`, the lower of two."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))


@final
class OFTAdapter(AbstractAdapter):
    """The rotation of one layer: oft_R holds the entries of each Q above its diagonal, row by row."""

    ROLES: ClassVar[Mapping[str, str]] = {"oft_R": "other"}
    upper: Tensor

    def __init__(self, config: OFT, shape: Shape) -> None:
        super().__init__()
        features = shape.out_features if shape.one_hot else shape.in_features
        self.config, self.one_hot, self.size = config, shape.one_hot, config.block_size(features)
        if self.size == 1:
            raise UsageError(
                f"{features} features cannot be cut into blocks of {config.oft_block_size or features // config.r}",
                why="the nearest size that divides them is 1, and a single number cannot be rotated",
                fix="take another oft_block_size, or leave this layer out with exclude_modules",
            )
        blocks = 1 if config.block_share else features // self.size
        self.oft_R = nn.Parameter(torch.empty(blocks, self.size * (self.size - 1) // 2))
        upper = torch.empty(2, self.size * (self.size - 1) // 2, dtype=torch.long)
        if not upper.is_meta:  # there only shapes matter, and making the indices would load torch's compiler (seconds)
            upper = torch.triu_indices(self.size, self.size, 1)
        self.register_buffer("upper", upper, persistent=False)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer: Q zero."""
        nn.init.zeros_(self.oft_R)

    def blocks(self) -> Tensor:
        """Give the blocks R (n, b, b), or (1, b, b) if they share one."""
        Q = self.oft_R.new_zeros(len(self.oft_R), self.size, self.size)
        Q[:, self.upper[0], self.upper[1]] = self.oft_R
        Q = Q - Q.mT
        return neumann(Q, self.config.num_cayley_neumann_terms) if self.config.use_cayley_neumann else cayley(Q)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Run the layer on the rotated input, in the dtype of the parameters as far as the rotation goes."""
        R = self.blocks()
        if self.one_hot:
            y = base.frozen(x)
            return rotate(y.to(R.dtype), R).to(y.dtype)
        if not base.VECTORS:
            weight = base.matrix().to(R.dtype)
            return on_patches(x, base, weight, self.merge(weight))
        return base.frozen(rotate(x.to(R.dtype), R).to(x.dtype))

    def merge(self, weight: Tensor) -> Tensor:
        """Rotate the rows of W (an embedding's columns)."""
        R = self.blocks().to(weight.dtype)
        return rotate(weight.mT, R).mT if self.one_hot else rotate(weight, R.mT)


def neumann(Q: Tensor, terms: int) -> Tensor:
    """Give I + 2Q + ... + 2Q^(terms - 2) + Q^(terms - 1) as PEFT adds it up: at least to Q³ from three terms on."""
    R = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).repeat(len(Q), 1, 1) + 2 * Q
    if terms == 2:
        return R
    power = Q @ Q
    R = R + 2 * power
    for _ in range(3, terms - 1):
        power = power @ Q
        R = R + 2 * power
    return R + power @ Q


METHOD = OFT
