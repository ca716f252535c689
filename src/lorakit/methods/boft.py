"""BOFT: Orthogonal Finetuning via Butterfly Factorization. Liu et al. 2023, https://arxiv.org/abs/2311.06243

    W' = diag(s)·W·R^T       R = F_m .. F_1: (in, in)      F_i = P_i·blockdiag(R_i1 .. R_in)·P_i^T     n b = in
    y = s·(W (R^T x)) + b    R_ij = (I - Q)(I + Q)^-1: (b, b)    Q = (T - T^T) / 2, T starts at 0     s: (out,) starts at 1

Each factor turns blocks of b numbers. Between the factors P_i mixes the blocks: within 2^(i-1) neighbouring ones, P_i
brings the even half blocks in front of the odd ones. So after m factors a number has met those of 2^(m-1) blocks, for
m n b² parameters; one block of that size would have 2^(m-1) times as many as one factor. m = 1 is OFT. No matrix (in,
in) is made: a permutation is a view of the half blocks with two dimensions exchanged. An embedding's vectors are
rotated, as in OFT.

Departures from the paper: s, the row lengths, as in the authors' code and PEFT. PEFT makes (in, in) matrices, and
without its CUDA extension it takes m = 1 whatever was asked for; so it reads a directory with larger m only on a GPU.

When: OFT's blocks are too small to reach what they should and larger ones have too many parameters. Each factor costs
what OFT costs; PEFT itself runs more than one factor on a GPU only.
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
class BOFT:
    """A product of sparse rotations of each layer's input. Give the size of the blocks or their number, the other one as 0.

    boft_block_size: inputs that one block rotates, b
    boft_block_num: number of blocks n, instead of their size
    boft_n_butterfly_factor: number of factors m
    boft_dropout: share of the blocks of one factor, drawn at random, that are the identity in a training step
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0

    PEFT: ClassVar = PeftFormat(
        "BOFT",
        tensors={"boft_R": "boft_R", "boft_s": "boft_s"},
        fields={
            "boft_block_size": "boft_block_size",
            "boft_block_num": "boft_block_num",
            "boft_n_butterfly_factor": "boft_n_butterfly_factor",
            "boft_dropout": "boft_dropout",
        },
        ignored={"init_weights": True},
    )

    def __post_init__(self) -> None:
        size, number = self.boft_block_size, self.boft_block_num
        if min(size, number) < 0 or (size == 0) == (number == 0):
            raise UsageError(
                f"one of boft_block_size and boft_block_num must be positive and the other 0, not {size} and {number}",
                why="their product is the number of the layer's inputs",
            )
        if size == 1:
            raise UsageError("boft_block_size must be at least 2", why="a single number cannot be rotated")
        if not 1 <= self.boft_n_butterfly_factor <= 32:
            raise UsageError(f"boft_n_butterfly_factor must be in [1, 32], not {self.boft_n_butterfly_factor}")
        if not 0 <= self.boft_dropout < 1:
            raise UsageError(f"boft_dropout must be in [0, 1), not {self.boft_dropout}")

    def build(self, shape: Shape) -> "BOFTAdapter":
        """Make the adapter of one layer."""
        return BOFTAdapter(self, shape)

    def blocks(self, features: int) -> tuple[int, int]:
        """Give (n, b) for vectors of this many entries. Raises UsageError if they cannot be cut so."""
        given = self.boft_block_size or self.boft_block_num
        number, size = (features // given, given) if self.boft_block_size else (given, features // given)
        last = 2 ** (self.boft_n_butterfly_factor - 1)
        fix = "take another boft_block_size, or leave this layer out with exclude_modules"
        if number * size != features or size < 2:
            raise UsageError(
                f"{features} features cannot be cut into equal blocks of two or more",
                why=f"{'boft_block_size' if self.boft_block_size else 'boft_block_num'} is {given}",
                fix=fix,
            )
        if last > 1 and (size % 2 or number % last):
            raise UsageError(
                f"{number} blocks of {size} features have no {self.boft_n_butterfly_factor} butterfly factors",
                why=f"the last one mixes {last} neighbouring blocks half by half",
                fix=fix,
            )
        return number, size


@final
class BOFTAdapter(AbstractAdapter):
    """The blocks (m, n, b, b) and the row lengths of one layer: (out, 1), as PEFT keeps them."""

    ROLES: ClassVar[Mapping[str, str]] = {"boft_R": "other", "boft_s": "magnitude"}

    def __init__(self, config: BOFT, shape: Shape) -> None:
        super().__init__()
        self.config, self.one_hot = config, shape.one_hot
        number, size = config.blocks(shape.out_features if shape.one_hot else shape.in_features)
        self.boft_R = nn.Parameter(torch.empty(config.boft_n_butterfly_factor, number, size, size))
        self.boft_s = nn.Parameter(torch.empty(shape.out_features, 1))

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer: Q zero, s one."""
        nn.init.zeros_(self.boft_R)
        nn.init.ones_(self.boft_s)

    def blocks(self) -> Tensor:
        """Give the blocks of all factors (m, n, b, b)."""
        return cayley((self.boft_R - self.boft_R.mT) / 2)

    @property
    def draws(self) -> bool:
        """Whether it drops blocks at random in training."""
        return self.config.boft_dropout > 0

    def dropout(self, R: Tensor) -> Tensor:
        """Make some blocks of one factor the identity, in training."""
        if not self.training or not self.config.boft_dropout:
            return R
        factors, number, size, _ = R.shape
        factor = torch.arange(factors, device=R.device) == torch.randint(factors, (), device=R.device)
        block = torch.rand(number, device=R.device).argsort() < int(self.config.boft_dropout * number)
        dropped = (factor[:, None] & block)[..., None, None]
        return torch.where(dropped, torch.eye(size, dtype=R.dtype, device=R.device), R)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Run the layer on the rotated input and scale its channels; the rotation is computed in the parameters' dtype."""
        R = self.dropout(self.blocks())
        if not (self.one_hot or base.VECTORS):
            weight = base.matrix().to(R.dtype)
            return on_patches(x, base, weight, self.merged(weight, R))
        if self.one_hot:
            y = base.frozen(x)
            y = butterfly(y.to(R.dtype), R).to(y.dtype)
        else:
            y = base.frozen(butterfly(x.to(R.dtype), R).to(x.dtype))
        return y + base.channels((self.boft_s[:, 0] - 1).to(y.dtype)) * base.without_bias(y)

    def merge(self, weight: Tensor) -> Tensor:
        """Rotate the rows of W (an embedding's columns) and scale them."""
        return self.merged(weight, self.blocks())

    def merged(self, weight: Tensor, R: Tensor) -> Tensor:
        """Give W' for these blocks."""
        R = R.to(weight.dtype)
        rotated = butterfly(weight.mT, R).mT if self.one_hot else butterfly(weight, R, transposed=True)
        return self.boft_s.to(weight.dtype) * rotated


def butterfly(x: Tensor, blocks: Tensor, *, transposed: bool = False) -> Tensor:
    """Give x R for x (..., in) and the blocks (m, n, b, b) of R's factors, or x R^T."""
    factors = list(enumerate(blocks))
    for i, block in factors if transposed else reversed(factors):
        x = rotate(permute(x, i, block.shape[-1], inverse=True), block.mT if transposed else block)
        x = permute(x, i, block.shape[-1])
    return x


def permute(x: Tensor, i: int, size: int, *, inverse: bool = False) -> Tensor:
    """Bring the even half blocks in front of the odd ones within each 2^i blocks, or back. Factor 0 permutes nothing."""
    if i == 0:
        return x
    pairs = (2, 2**i) if inverse else (2**i, 2)
    return x.unflatten(-1, (-1, *pairs, size // 2)).transpose(-2, -3).flatten(-4)


METHOD = BOFT
