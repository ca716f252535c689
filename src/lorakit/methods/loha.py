"""LoHa: the change is the Hadamard product of two low-rank matrices. FedPara, Hyeon-Woo, Ye-Bin and Oh 2021,
https://arxiv.org/abs/2108.06098; as an adapter LyCORIS, Yeh et al. 2023, https://arxiv.org/abs/2309.14859

    W' = W + s·(w1_a w1_b) ⊙ (w2_a w2_b)        w_a: (out, r)   w_b: (r, in)   s = alpha/r

Twice the parameters of LoRA at the same r, for a change of rank up to r^2.

Without gradients the change is made as a matrix and applied, as LyCORIS and PEFT do, to the same bits. In training it
is applied as what it is by the distributive law, r^2 products of a column and a row:

    s·B·A        B: (out, r^2) columns w1_a[:, i] ⊙ w2_a[:, j]      A: (r^2, in) rows w1_b[i] ⊙ w2_b[j]

where that is less work (r^2 (out + in) < out·in), so that no matrix of the size of W is made. Of an embedding the rows
that are looked up are multiplied.

Departures from the papers: FedPara's nonlinearity for federated learning and its Tucker form for convolutions are not
there (PEFT's `use_effective_conv2d`). The start is PEFT's, Kaiming-uniform with w2_b at zero; LyCORIS's is Gaussian.

When: a change of higher rank than LoRA's is wanted from a given number of parameters, as for styles of image models. In
training it costs the work of LoRA of rank r^2, and unmerged generation as much as making a matrix like W a token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Base, PeftFormat, Shape
from ..core.statistics import Statistics
from ..kernels.low_rank import LowRank
from ._dense import recomputed
from ._factors import alpha_or_default, check, scaling


@dataclass(frozen=True, kw_only=True)
class LoHa:
    """r: rank of each of the two matrices. alpha: scale, 2r if not given."""

    r: int = 8
    alpha: float | None = None

    PEFT: ClassVar = PeftFormat(
        "LOHA",
        tensors={name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
        fields={"r": "r", "alpha": "alpha"},
        ignored={"rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True},
    )

    def __post_init__(self) -> None:
        check(self.r, self.alpha, dropout=0.0)

    def at(self, r: int, alpha: float | None) -> "LoHa":
        """Give the same with another rank and alpha."""
        return replace(self, r=r, alpha=alpha)

    def build(self, shape: Shape) -> "LoHaAdapter":
        """Make the adapter of one layer; its own config has alpha as a number."""
        return LoHaAdapter(replace(self, alpha=alpha_or_default(self.r, self.alpha)), shape)


@final
class LoHaAdapter(AdditiveAdapter):
    """The two pairs of one layer."""

    # No pair of them is A and B of a product: what B's gradient is depends on the other pair.
    ROLES: ClassVar[Mapping[str, str]] = dict.fromkeys(LoHa.PEFT.tensors, "other")
    scale: Tensor

    def __init__(self, config: LoHa, shape: Shape) -> None:
        super().__init__()
        self.config, r = config, config.r
        self.hada_w1_a, self.hada_w1_b = _pair(shape, r)
        self.hada_w2_a, self.hada_w2_b = _pair(shape, r)
        self.register_buffer("scale", scaling(r, alpha_or_default(r, config.alpha), stabilized=False), persistent=False)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer: w2_b zero, the rest Kaiming-uniform."""
        for factor in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        nn.init.zeros_(self.hada_w2_b)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give w1_a, w1_b, w2_a, w2_b."""
        return self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b

    def delta_weight(self) -> Tensor:
        """Give s·(w1_a w1_b) ⊙ (w2_a w2_b)."""
        return _product(*self.factors(), self.scale)

    def low_rank(self, base: Base) -> LowRank | None:
        """Give the r^2 columns and rows, if they are less work than the matrix."""
        (out, r), inputs = self.hada_w1_a.shape, self.hada_w1_b.shape[1]
        if r * r * (out + inputs) >= out * inputs:
            return None
        A = (self.hada_w1_b[:, None] * self.hada_w2_b).flatten(0, 1)
        B = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]).flatten(1)
        return LowRank(A, B, self.scale)

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Apply the matrix, or multiply what an embedding looks up, in the dtype the layer computes in."""
        w1_a, w1_b, w2_a, w2_b = self.factors()
        if not x.is_floating_point():
            return base.mix(base.project(x, w1_b), w1_a) * base.mix(base.project(x, w2_b), w2_a) * self.scale

        def change(x: Tensor, *factors: Tensor) -> Tensor:
            return base.project(x, _product(*factors).to(x.dtype))

        return recomputed(change, x, w1_a, w1_b, w2_a, w2_b, self.scale)


def _pair(shape: Shape, r: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.empty(shape.out_features, r)), nn.Parameter(torch.empty(r, shape.in_features))


def _product(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: Tensor) -> Tensor:
    return (w1_a @ w1_b) * (w2_a @ w2_b) * scale


METHOD = LoHa
