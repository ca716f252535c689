"""VeRA: Vector-based Random Matrix Adaptation. Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454

    W' = W + diag(b)·B·diag(d)·A        A: (r, in)   B: (out, r)   d: (r,) starts at 0.1   b: (out,) starts at 0

A and B are random, frozen and the same for every layer: one pair of the largest shapes is made from a seed (as PEFT
makes it, bit for bit), and a layer of another shape uses its first columns and rows. Only b and d are trained, out + r
numbers a layer.

Departures from the paper: none. The parts of a fused projection and embeddings share the pair too, which PEFT does not
do.

When: many adapters are to be kept, for one is out + r numbers a layer. It costs the work of a high rank in every pass
until it is merged, and learns less than LoRA on changes that its random directions do not hold.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Base, PeftFormat, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ._factors import check, check_seed, dropout


@dataclass(frozen=True, kw_only=True)
class VeRA:
    """Trained scales of one random pair. It wants a higher rank and a higher learning rate (1e-3 to 1e-2) than LoRA.

    r: rank
    dropout: on the input of A
    d_initial: first value of d
    projection_prng_key: seed of A and B
    save_projection: write A and B too; without them whoever reads the file makes them from the seed again
    """

    r: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    projection_prng_key: int = 0
    save_projection: bool = True

    PEFT: ClassVar = PeftFormat(
        "VERA",
        tensors={"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"},
        fields={
            "r": "r",
            "dropout": "vera_dropout",
            "d_initial": "d_initial",
            "projection_prng_key": "projection_prng_key",
            "save_projection": "save_projection",
        },
        ignored={"init_weights": True},
    )

    def __post_init__(self) -> None:
        check(self.r, None, self.dropout)
        if not math.isfinite(self.d_initial) or self.d_initial == 0:
            raise UsageError(
                f"d_initial must be a number other than 0, not {self.d_initial}", why="b gets no gradient where d is 0"
            )
        check_seed(self.projection_prng_key)

    def shared(self, shapes: Sequence[Shape]) -> "SharedVeRA":
        """Give the method for layers of these shapes, which hold one pair."""
        return SharedVeRA(self, max(s.out_features for s in shapes), max(s.in_features for s in shapes))

    def build(self, shape: Shape) -> "VeRAAdapter":
        """Make the adapter of a single layer."""
        return self.shared([shape]).build(shape)


@final
class SharedVeRA:
    """VeRA for layers of up to (out, in). The pair is made with the first layer."""

    def __init__(self, config: VeRA, out_features: int, in_features: int) -> None:
        self.config, self.shape = config, Shape(out_features, in_features)
        self.pair: Projections | None = None

    def build(self, shape: Shape) -> "VeRAAdapter":
        """Make the adapter of one layer."""
        self.pair = self.pair or Projections(self.config, self.shape)
        return VeRAAdapter(self.config, shape, self.pair)


@final
class Projections(nn.Module):
    """A and B. A module, so that `to` moves them once for all layers. Not in the state dict: a seed makes them."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, config: VeRA, shape: Shape) -> None:
        super().__init__()
        for name, size in {"vera_A": (config.r, shape.in_features), "vera_B": (shape.out_features, config.r)}.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.float32), persistent=False)
        if not self.vera_A.is_meta:  # on meta, where a file is checked, only the shapes matter
            generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
            for tensor in (self.vera_A, self.vera_B):
                bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(tensor.shape[1]))
                drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
                tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))


@final
class VeRAAdapter(AdditiveAdapter):
    """The vectors of one layer."""

    ROLES: ClassVar[Mapping[str, str]] = {"vera_lambda_b": "B", "vera_lambda_d": "A"}

    def __init__(self, config: VeRA, shape: Shape, pair: Projections) -> None:
        super().__init__()
        self.config, self.shape, self.pair = config, shape, pair
        self.vera_lambda_b = nn.Parameter(torch.empty(shape.out_features))
        self.vera_lambda_d = nn.Parameter(torch.empty(config.r))
        self.dropout = dropout(config.dropout)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer: b zero."""
        nn.init.zeros_(self.vera_lambda_b)
        nn.init.constant_(self.vera_lambda_d, self.config.d_initial)

    def projections(self) -> tuple[Tensor, Tensor]:
        """Give this layer's A (r, in) and B (out, r), views of the common ones."""
        return self.pair.vera_A[:, : self.shape.in_features], self.pair.vera_B[: self.shape.out_features]

    def delta_weight(self) -> Tensor:
        """Give diag(b)·B·diag(d)·A."""
        A, B = self.projections()
        return (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give b·B(d·A(dropout(x))), in the dtype the layer computes in."""
        A, B = self.projections()
        b, d = self.vera_lambda_b, self.vera_lambda_d
        if x.is_floating_point():  # token ids are not dropped
            A, B, b, d, x = A.to(x.dtype), B.to(x.dtype), b.to(x.dtype), d.to(x.dtype), self.dropout(x)
        return base.channels(b) * base.mix(base.channels(d) * base.project(x, A), B)

    def shared_tensors(self) -> dict[str, Tensor]:
        """Give A and B, if they are to be saved."""
        pair = {"vera_A": self.pair.vera_A, "vera_B": self.pair.vera_B}
        return pair if self.config.save_projection else {}


METHOD = VeRA
