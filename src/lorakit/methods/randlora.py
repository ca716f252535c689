"""RandLoRA: Full-rank parameter-efficient fine-tuning. Albert et al. 2025, https://arxiv.org/abs/2502.00987

    W' = W + s·sum_q B_q·λ_q·(A_q ∘ γ_q)       q: r n terms of rank one     n = ceil(min(in, out) / r)     s = alpha / r

n random bases of rank r cover the smaller side of W, so that the change can have full rank. A (r, min) and B (max, n,
r) are random, frozen and the same for every layer: one pair of the largest shapes is made from a seed (as PEFT makes
it, bit for bit), and a layer of another shape uses the front of it. Trained are λ (r, n), a factor of each term, and γ
(n, min), which scales each base along the smaller side: n (r + min) numbers a layer, fewer with a larger r. λ starts
at 0.

Term q takes row q // n of A, λ[q // n, q % n] and γ[q % n], and of B base q // r, column q % r: PEFT flattens the two
the other way round, so that a row of A meets columns of several bases. They are random, and it makes no difference
which; but it does for reading a file.

If in <= out, A is on the side of the input; else B is (its rows then stand for inputs) and A on that of the output.
The change is computed in the parameters' dtype, as in PEFT, also where the layer computes in bf16: with s = 20 large
terms cancel.

Departures from the paper: none. The parts of a fused projection share the pair too, which PEFT does not do. Embeddings
are refused: B would have a row for every token.

When: LoRA's rank is the limit and its parameters are not to grow. The change has full rank, in a random subspace. It
costs two products of the size of W for every token, in fp32, until it is merged: what it saves is the memory of the
optimizer and of the file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Base, PeftFormat, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ._factors import check, check_seed, dropout


@dataclass(frozen=True, kw_only=True)
class RandLoRA:
    """Trained scales of random bases that cover a whole matrix.

    r: rank of a base; the fewer, the more parameters
    randlora_alpha: scale, divided by r; with the paper's 20 r a lower learning rate than LoRA's
    dropout: on the input
    sparse: bases of -1, 0 and 1 alone, two thirds of them 0
    very_sparse: the same, all but 1/sqrt(min(in, out)) of them 0
    projection_prng_key: seed of the bases
    save_projection: write the bases too; without them whoever reads the file makes them from the seed again
    """

    r: int = 32
    randlora_alpha: float = 640.0
    dropout: float = 0.0
    sparse: bool = False
    very_sparse: bool = False
    projection_prng_key: int = 0
    save_projection: bool = True

    PEFT: ClassVar = PeftFormat(
        "RANDLORA",
        tensors={"randlora_lambda": "randlora_lambda", "randlora_gamma": "randlora_gamma"},
        fields={
            "r": "r",
            "randlora_alpha": "randlora_alpha",
            "dropout": "randlora_dropout",
            "sparse": "sparse",
            "very_sparse": "very_sparse",
            "projection_prng_key": "projection_prng_key",
            "save_projection": "save_projection",
        },
        ignored={"init_weights": True},
    )

    def __post_init__(self) -> None:
        check(self.r, None, self.dropout)
        if not 0 < self.randlora_alpha <= 1e6:
            raise UsageError(f"randlora_alpha must be above 0 and at most 1e6, not {self.randlora_alpha}")
        check_seed(self.projection_prng_key)
        object.__setattr__(self, "randlora_alpha", float(self.randlora_alpha))  # 1 and 1.0 are written alike

    def shared(self, shapes: Sequence[Shape]) -> "SharedRandLoRA":
        """Give the method for layers of these shapes, which hold one pair."""
        return SharedRandLoRA(self, max(s.out_features for s in shapes), max(s.in_features for s in shapes))

    def build(self, shape: Shape) -> "RandLoRAAdapter":
        """Make the adapter of a single layer."""
        return self.shared([shape]).build(shape)


@final
class SharedRandLoRA:
    """RandLoRA for layers of up to (out, in). The pair is made with the first layer."""

    def __init__(self, config: RandLoRA, out_features: int, in_features: int) -> None:
        self.config, self.sides = config, (min(out_features, in_features), max(out_features, in_features))
        self.pair: Bases | None = None

    def build(self, shape: Shape) -> "RandLoRAAdapter":
        """Make the adapter of one layer."""
        if shape.one_hot:
            raise UsageError(
                "RandLoRA cannot adapt an embedding",
                why="every layer would hold random bases with a row for each token of the vocabulary",
                fix="leave it out with exclude_modules",
            )
        self.pair = self.pair or Bases(self.config, *self.sides)
        return RandLoRAAdapter(self.config, shape, self.pair)


@final
class Bases(nn.Module):
    """A (r, 1, min) and B (max, n, r). A module, so that `to` moves them once for all layers; not in the state dict."""

    randlora_A: Tensor
    randlora_B: Tensor

    def __init__(self, config: RandLoRA, smaller: int, larger: int) -> None:
        super().__init__()
        n = -(-smaller // config.r)
        sizes = {"randlora_A": (config.r, 1, smaller), "randlora_B": (larger, n, config.r)}
        for name, size in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.float32), persistent=False)
        if self.randlora_A.is_meta:  # where a file is checked only the shapes matter
            return
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        if config.sparse or config.very_sparse:
            wanted = math.sqrt(smaller) if config.very_sparse else 3
            A, B = (ternary(size, wanted, generator) for size in sizes.values())
        else:
            A = uniform(sizes["randlora_A"], generator)
            B = torch.cat([uniform((larger, 1, config.r), generator) for _ in range(n)], dim=1)
        self.randlora_A.copy_(A / A.std())
        self.randlora_B.copy_(B / B.std())


def uniform(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw a base as PEFT does, in bf16."""
    drawn = torch.empty(size, dtype=torch.bfloat16, device="cpu")
    return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)


def ternary(size: tuple[int, ...], wanted: float, generator: torch.Generator) -> Tensor:
    """Draw -1 and 1 with probability 1 / (2 wanted) each, else 0."""
    drawn = torch.rand(size, generator=generator, device="cpu")
    edge = 1 / (2 * wanted)
    return (drawn > 1 - edge).float() - (drawn < edge).float()


@final
class RandLoRAAdapter(AdditiveAdapter):
    """The scales of one layer."""

    ROLES: ClassVar[Mapping[str, str]] = {"randlora_lambda": "B", "randlora_gamma": "A"}
    scale: Tensor

    def __init__(self, config: RandLoRA, shape: Shape, pair: Bases) -> None:
        super().__init__()
        self.config, self.shape, self.pair = config, shape, pair
        smaller = min(shape.out_features, shape.in_features)
        n = -(-smaller // config.r)
        self.randlora_lambda = nn.Parameter(torch.empty(config.r, n))
        self.randlora_gamma = nn.Parameter(torch.empty(n, smaller))
        self.dropout = dropout(config.dropout)
        self.register_buffer("scale", torch.tensor(config.randlora_alpha / config.r), persistent=False)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer: λ zero."""
        nn.init.zeros_(self.randlora_lambda)
        nn.init.constant_(self.randlora_gamma, 1 / max(self.randlora_gamma.shape))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Give the two factors of the change: (r n, in) and (out, r n)."""
        n, smaller = self.randlora_gamma.shape
        larger = max(self.shape.out_features, self.shape.in_features)
        A, B = self.pair.randlora_A[:, 0, :smaller], self.pair.randlora_B[:larger, :n].flatten(1)
        # A compiler sees by itself what need not be kept, and does not know our operation.
        multiply = scaled if torch.compiler.is_compiling() else Scaled.apply
        first = multiply(A, self.randlora_lambda, self.randlora_gamma).flatten(0, 1)
        return (first, B) if smaller == self.shape.in_features else (B.T, first.T)

    def delta_weight(self) -> Tensor:
        """Give s times the product of the factors."""
        first, second = self.factors()
        return self.scale * (second @ first)

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give the change for dropout(x), in the dtype of the parameters."""
        first, second = self.factors()
        return base.mix(base.project(self.dropout(x).to(first.dtype), first), second) * self.scale

    def shared_tensors(self) -> dict[str, Tensor]:
        """Give the bases, if they are to be saved."""
        pair = {"randlora_A": self.pair.randlora_A, "randlora_B": self.pair.randlora_B}
        return pair if self.config.save_projection else {}


def scaled(A: Tensor, scales: Tensor, gamma: Tensor) -> Tensor:
    """Give λ[k, j] A[k, :] ∘ γ[j, :] as (r, n, min) for A (r, min)."""
    return scales[:, :, None] * A[:, None] * gamma


@final
class Scaled(torch.autograd.Function):
    """`scaled` for which three small tensors are kept; autograd alone would keep one of the size of the result too."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, scales: Tensor, gamma: Tensor) -> Tensor:
        """Multiply them."""
        ctx.save_for_backward(A, scales, gamma)
        return scaled(A, scales, gamma)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        """Sum over what each scale multiplied."""
        A, scales, gamma = ctx.saved_tensors
        by_base = gradients[0] * A[:, None]
        return None, torch.einsum("knj,nj->kn", by_base, gamma), torch.einsum("knj,kn->nj", by_base, scales)


METHOD = RandLoRA
