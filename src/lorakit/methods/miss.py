"""MiSS: Matrix Shard Sharing, also Bone. Kang and Yin 2024, https://arxiv.org/abs/2409.15371

W is cut into shards of r columns, and all shards get the same change, the transposed D:

    standard   W' = W + [D^T D^T .. D^T]     D: (r, out)       y = W x + D^T (x_1 + .. + x_n) + b    x_j: r entries of x
    mini       the same, D: (r, mini_r) side by side out/mini_r times
    bat        W'_ij = W_ij + W_ij D_i + D_i    D: (out/r, r, r)    W_ij: (r, r) blocks of W, i down, j across

D starts at 0. The change has rank r at r·out parameters, half of LoRA's for a square matrix, and costs a sum and one
thin product. Where r does not divide the inputs the last shard is cut short. bat is not linear in D and W together: it
makes W' anew in each step, a product of out·in·r multiplications, and its output is the base's to the last bit at the
start only where the layer has no bias; with one, the bias is added in another order.

Departures from the paper: none. Embeddings are refused: token ids r apart would share one change.

When: LoRA is to be had with half the parameters of the same rank and a sum instead of the product on the side of the
input. The change is the same for every r-th input, whatever these have to do with each other. bat costs a product of
the size of W in each pass, of one token too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, AdditiveAdapter, Base, PeftFormat, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ._factors import dropout

VARIANTS = ("standard", "bat", "mini")


@dataclass(frozen=True, kw_only=True)
class MiSS:
    """One change shared by all shards of a matrix. It wants a higher rank than LoRA (64 in the paper).

    r: columns of a shard, the rank of the change; at most the layer's inputs
    variant: standard, bat (the change depends on the shard) or mini (the outputs share too)
    mini_r: outputs after which D repeats, in mini; it must divide them
    dropout: on the input of D; not in bat, which has none
    """

    r: int = 8
    variant: Literal["standard", "bat", "mini"] = "standard"
    mini_r: int = 1
    dropout: float = 0.0

    PEFT: ClassVar = PeftFormat(
        "MISS",
        tensors={"miss_block": "miss_block"},
        fields={"r": "r", "variant": "init_weights", "mini_r": "mini_r", "dropout": "miss_dropout"},
        values={"variant": {True: "standard", False: "standard", "bat": "bat", "mini": "mini"}},
    )

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UsageError(f"there is no variant {self.variant!r}", fix=f"there are: {', '.join(VARIANTS)}")
        if self.r < 1 or self.mini_r < 1:
            raise UsageError(f"r and mini_r must be at least 1, not {self.r} and {self.mini_r}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.dropout and self.variant == "bat":
            raise UsageError("the variant bat has no dropout", why="it changes the matrix, not what comes out of it")

    def build(self, shape: Shape) -> AbstractAdapter:
        """Make the adapter of one layer."""
        if shape.one_hot:
            raise UsageError(
                "MiSS cannot adapt an embedding",
                why="its inputs are token ids, and ids r apart would share one change for no reason",
                fix="leave it out with exclude_modules",
            )
        out, inner = shape.out_features, shape.in_features
        what = f"a layer of {inner} inputs and {out} outputs does not fit this MiSS"
        if self.r > inner:
            raise UsageError(what, why=f"r is {self.r}, and a shard cannot be wider than the matrix")
        if self.variant == "bat" and (out % self.r or inner % self.r):
            raise UsageError(what, why=f"the variant bat needs whole blocks of {self.r} x {self.r}")
        if self.variant == "mini" and out % self.mini_r:
            raise UsageError(what, why=f"mini_r is {self.mini_r}, which does not divide the outputs")
        return BatAdapter(self, shape) if self.variant == "bat" else MiSSAdapter(self, shape)


@final
class MiSSAdapter(AdditiveAdapter):
    """The shared shard of one layer: D (r, out), or (r, mini_r)."""

    ROLES: ClassVar[Mapping[str, str]] = {"miss_block": "B"}

    def __init__(self, config: MiSS, shape: Shape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        width = config.mini_r if config.variant == "mini" else shape.out_features
        self.miss_block = nn.Parameter(torch.empty(config.r, width))
        self.dropout = dropout(config.dropout)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer: D zero."""
        nn.init.zeros_(self.miss_block)

    def shard(self) -> Tensor:
        """Give D (r, out)."""
        return self.miss_block.repeat(1, self.shape.out_features // self.miss_block.shape[1])

    def delta_weight(self) -> Tensor:
        """Give D^T once for each shard."""
        shards = -(-self.shape.in_features // self.config.r)
        return self.shard().T.repeat(1, shards)[:, : self.shape.in_features]

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give D^T of the sum of the shards of dropout(x); a convolution cannot sum what its kernel sees before it runs."""
        D = self.shard().to(x.dtype)
        r = len(D)
        if not base.VECTORS:
            one = torch.eye(r, dtype=x.dtype, device=x.device)
            sums = one.repeat(1, -(-self.shape.in_features // r))[:, : self.shape.in_features]
            return base.mix(base.project(self.dropout(x), sums), D.T)
        padded = self.dropout(F.pad(x, (0, -x.shape[-1] % r)))
        return padded.unflatten(-1, (-1, r)).sum(-2) @ D


@final
class BatAdapter(AbstractAdapter):
    """The blocks D (out/r, r, r) of one layer."""

    ROLES: ClassVar[Mapping[str, str]] = {"miss_block": "B"}

    def __init__(self, config: MiSS, shape: Shape) -> None:
        super().__init__()
        self.config = config
        self.miss_block = nn.Parameter(torch.empty(shape.out_features // config.r, config.r, config.r))

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer: D zero."""
        nn.init.zeros_(self.miss_block)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Run the layer with the merged matrix."""
        weight = base.matrix()
        merged = self.merge(weight.to(self.miss_block.dtype))
        return base.plus_bias(base.project(x, merged.to(weight.dtype)))

    def merge(self, weight: Tensor) -> Tensor:
        """Give W_ij + W_ij D_i + D_i for every block; in memory a row of W is r of a block, then r of the next."""
        D = self.miss_block.to(weight.dtype)
        rows = weight.reshape(len(D), -1, self.config.r)
        change = (rows @ D).unflatten(1, (self.config.r, -1)) + D[:, :, None]
        return weight + change.reshape(weight.shape)


METHOD = MiSS
