"""LoKr: the change is the Kronecker product of two small matrices. LyCORIS, Yeh et al. 2023,
https://arxiv.org/abs/2309.14859; KronA, Edalati et al. 2022, https://arxiv.org/abs/2212.10650

    W' = W + s·kron(w1, w2)        w1: (a, b)   w2: (c, d)   a c = out   b d = in   s = alpha/r

a <= c and b <= d are as close to each other as divisors of out and in can be, or, with `decompose_factor`, a and b are
the largest divisors up to it. w2 is a product w2_a (c, r) w2_b (r, d) where r < max(c, d)/2, and with `decompose_both`
w1 is one where r < max(a, b)/2. The rank of the change is that of w1 times that of w2.

The product is not made for a linear layer: for x seen as a matrix X (b, d), its row of the output is w1 X w2^T, seen as
a vector. Neither is it for an embedding: token t's row is the outer product of column t // d of w1 and t % d of w2. For a
convolution, where w2 has the kernel, it is made.

Departures from the paper: none in the map. The start is LyCORIS's, w2 (or w2_b) at zero; PEFT's puts w1 there. As in
PEFT, and unlike in LyCORIS, s is alpha/r also where neither matrix is a product of two. Its Tucker form for
convolutions (PEFT's `use_effective_conv2d`) is not there. PEFT 0.21 takes another Kronecker product for an nn.Conv1d
whose w2 is no product of two.

When: the file must be small and the rank high: with the default factor it has far fewer parameters than LoRA. It costs
little work, but all blocks of its change are multiples of one matrix.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Base, PeftFormat, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ._dense import recomputed
from ._factors import alpha_or_default, check, scaling

NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


@dataclass(frozen=True, kw_only=True)
class LoKr:
    """A Kronecker product of a small matrix and of a larger one, which is of low rank.

    r: rank of what is a product of two
    alpha: scale, 2r if not given
    decompose_both: make the small matrix a product of two as well, where that is smaller
    decompose_factor: largest side of the small matrix, -1 for nearly the square root of the layer's
    """

    r: int = 8
    alpha: float | None = None
    decompose_both: bool = False
    decompose_factor: int = -1

    PEFT: ClassVar = PeftFormat(
        "LOKR",
        tensors={name: name for name in NAMES},
        fields={
            "r": "r",
            "alpha": "alpha",
            "decompose_both": "decompose_both",
            "decompose_factor": "decompose_factor",
        },
        ignored={"rank_dropout": 0.0, "rank_dropout_scale": False, "module_dropout": 0.0, "init_weights": True},
    )

    def __post_init__(self) -> None:
        check(self.r, self.alpha, dropout=0.0)
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise UsageError(f"decompose_factor must be at least 1, or -1, not {self.decompose_factor}")

    def at(self, r: int, alpha: float | None) -> "LoKr":
        """Give the same with another rank and alpha."""
        return replace(self, r=r, alpha=alpha)

    def build(self, shape: Shape) -> "LoKrAdapter":
        """Make the adapter of one layer; its own config has alpha as a number."""
        most = max(shape.out_features, shape.in_features)
        if self.r > most:
            raise UsageError(
                f"r is {self.r}, but no side of the layer is longer than {most}",
                why="above half of the longer side of w2 nothing is a product of rank r any more",
                fix="lower r, or set rank_pattern for this layer",
            )
        return LoKrAdapter(replace(self, alpha=alpha_or_default(self.r, self.alpha)), shape)


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Give (m, n) with m n = `dimension` and m <= n as near to each other as possible, m at most `factor` if it is not -1.

    A `factor` that divides is m itself, even if it is above n.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = min(math.isqrt(dimension), dimension if factor == -1 else factor)
    m = next(m for m in range(most, 0, -1) if dimension % m == 0)
    return m, dimension // m


@final
class LoKrAdapter(AdditiveAdapter):
    """The two matrices of one layer, each whole or as a product of two."""

    ROLES: ClassVar[Mapping[str, str]] = dict.fromkeys(NAMES, "other")
    lokr_w1: Tensor
    lokr_w1_a: Tensor
    lokr_w1_b: Tensor
    lokr_w2: Tensor
    lokr_w2_a: Tensor
    lokr_w2_b: Tensor
    scale: Tensor

    def __init__(self, config: LoKr, shape: Shape) -> None:
        super().__init__()
        self.config, r = config, config.r
        a, c = factorization(shape.out_features, config.decompose_factor)
        b, d = factorization(shape.in_features // shape.kernel, config.decompose_factor)
        self.low1, self.low2 = config.decompose_both and r < max(a, b) / 2, r < max(c, d) / 2
        for name, rows, columns, low in (
            ("lokr_w1", a, b, self.low1),
            ("lokr_w2", c, d * shape.kernel, self.low2),
        ):
            if low:
                self.register_parameter(f"{name}_a", nn.Parameter(torch.empty(rows, r)))
                self.register_parameter(f"{name}_b", nn.Parameter(torch.empty(r, columns)))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(rows, columns)))
        self.register_buffer("scale", scaling(r, alpha_or_default(r, config.alpha), stabilized=False), persistent=False)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer: w2, or its second factor, zero, the rest Kaiming-uniform."""
        zero = "lokr_w2_b" if self.low2 else "lokr_w2"
        for name, parameter in self.named_parameters():
            if name == zero:
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def w1(self) -> Tensor:
        """Give w1 (a, b)."""
        return self.lokr_w1_a @ self.lokr_w1_b if self.low1 else self.lokr_w1

    def w2(self) -> Tensor:
        """Give w2 (c, d); d holds the kernel of a convolution."""
        return self.lokr_w2_a @ self.lokr_w2_b if self.low2 else self.lokr_w2

    def delta_weight(self) -> Tensor:
        """Give s·kron(w1, w2)."""
        return _kron(self.w1(), self.w2(), self.scale)

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give s·w1 X w2^T as a vector, in the dtype the layer computes in."""
        w1, w2 = self.w1(), self.w2()
        if not x.is_floating_point():
            first = base.project(x, w1.repeat_interleave(w2.shape[1], 1))
            second = base.project(x, w2.repeat(1, w1.shape[1]))
            return (first[..., :, None] * second[..., None, :]).flatten(-2) * self.scale
        if not base.VECTORS:
            return recomputed(lambda x, *factors: base.project(x, _kron(*factors).to(x.dtype)), x, w1, w2, self.scale)
        X = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
        if self.low2:  # by its factors, without w2
            h = X @ self.lokr_w2_b.to(x.dtype).T @ self.lokr_w2_a.to(x.dtype).T
        else:
            h = X @ w2.to(x.dtype).T
        return (w1.to(x.dtype) @ h).flatten(-2) * self.scale.to(x.dtype)


def _kron(w1: Tensor, w2: Tensor, scale: Tensor) -> Tensor:
    return torch.kron(w1, w2) * scale


METHOD = LoKr
