"""aLoRA: Activated LoRA. Greenewald et al. 2025, https://arxiv.org/abs/2504.12397

    y_t = W x_t + b + [t >= T] s·B·A x_t        A: (r, in)   B: (out, r)   s = alpha/r, or alpha/sqrt(r)

T is where the invocation tokens begin the last time in a row; without them nothing is added. To all positions in front
the model is the base model, so that the keys and values of a long context, computed by the base or for another
adapter, are used again when the adapter is called: put the invocation tokens behind the context and go on with its
cache.

With a cache the tokens that are in it are searched too, and a row that has been activated stays so, also if it
writes the invocation tokens again. In a packed row each document is searched for itself. Hidden tokens (padding)
match nothing.

Departures from the paper: none. In PEFT `generate` looks at the prompt alone; here the model may call the adapter by
writing the invocation tokens. Without invocation tokens it is LoRA. It works on layers that run once for each token of
the input: not on embeddings, convolutions, encoders of other inputs, nor on experts that are given some of the tokens.

It cannot be merged, for there would be no base weights left for the tokens in front.

When: one model serves several tasks on the same long context, and computing the context anew for each of them is what
costs. It learns like LoRA, except that it cannot change how the context is read: give it a higher rank (32 in the
paper).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from ..core.adapter import AbstractAdapter, Base, PeftFormat, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ..core.tokens import Tokens, Watcher
from ._factors import alpha_or_default, check, check_starts_at_zero, dropout, factors, scaling, start


@dataclass(frozen=True, kw_only=True)
class ALoRA:
    """LoRA from the last occurrence of some tokens on.

    invocation_tokens: ids of the tokens that activate it, as the tokenizer gives them inside a text; none: always active
    r: rank
    alpha: scale, 2r if not given
    dropout: on the input of A
    rank_stabilized: divide alpha by sqrt(r) instead of r
    init: start value of A and B; one that starts from factors of W is refused
    """

    invocation_tokens: tuple[int, ...] = ()
    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    init: str = "kaiming"

    PEFT: ClassVar = PeftFormat(
        "LORA",
        tensors={"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
        fields={
            "invocation_tokens": "alora_invocation_tokens",
            "r": "r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "rank_stabilized": "use_rslora",
        },
        values={"invocation_tokens": {None: ()}},
        constants={"use_dora": False},
        marked_by="alora_invocation_tokens",
    )

    def __post_init__(self) -> None:
        check(self.r, self.alpha, self.dropout)
        if any(token < 0 for token in self.invocation_tokens):
            raise UsageError(f"invocation_tokens are token ids, not {list(self.invocation_tokens)}")
        check_starts_at_zero(self.init, "aLoRA", ", which would act on every token")

    def at(self, r: int, alpha: float | None) -> "ALoRA":
        """Give the same with another rank and alpha."""
        return replace(self, r=r, alpha=alpha)

    def shared(self, shapes: Sequence[Shape]) -> "SharedALoRA":
        """Give the method for the layers of one model, which are activated together."""
        gate = Gate(self.invocation_tokens) if self.invocation_tokens else None
        return SharedALoRA(self, gate, self.r, self.alpha)

    def build(self, shape: Shape) -> "ALoRAAdapter":
        """Make the adapter of a single layer."""
        return self.shared([shape]).build(shape)


@final
@dataclass(frozen=True, eq=False)
class SharedALoRA:
    """aLoRA with the gate of one attachment."""

    config: ALoRA
    gate: "Gate | None"
    r: int
    alpha: float | None

    def at(self, r: int, alpha: float | None) -> "SharedALoRA":
        """Give the same gate with another rank and alpha."""
        return replace(self, r=r, alpha=alpha)

    def build(self, shape: Shape) -> "ALoRAAdapter":
        """Make the adapter of one layer; its own config has alpha as a number."""
        if shape.one_hot:
            raise UsageError(
                "aLoRA cannot adapt an embedding",
                why="PEFT reads such an adapter as plain LoRA, which acts on every token",
                fix="leave it out with exclude_modules",
            )
        return ALoRAAdapter(self.config.at(self.r, alpha_or_default(self.r, self.alpha)), shape, self.gate)


@final
class Gate(Watcher):
    """Finds the invocation tokens in what the model is given. `on`: (B, T), where the adapter is active."""

    def __init__(self, invocation_tokens: Sequence[int]) -> None:
        super().__init__()
        self.invocation_tokens = tuple(invocation_tokens)
        self.on: Tensor | None = None

    def see(self, tokens: Tokens | None) -> None:
        """Search the tokens."""
        self.on = None if tokens is None else active(tokens, self.invocation_tokens)

    def over(self, x: Tensor) -> Tensor:
        """Give where the adapter is active, to broadcast over x (..., in). Raises UsageError if that is not known."""
        fix = "target layers that run once for each token, and call the model that the adapter was attached to"
        if self.on is None:
            raise UsageError("aLoRA was shown no token ids", why="it looks for the invocation tokens in them", fix=fix)
        positions = x.shape[:-1]
        if positions not in (self.on.shape, (self.on.numel(),)):
            why = f"the model was given {tuple(self.on.shape)} tokens, the layer {tuple(positions)} vectors"
            raise UsageError("aLoRA cannot tell which tokens a layer is given", why=why, fix=fix)
        return self.on.reshape(positions)[..., None]


def active(tokens: Tokens, sequence: Sequence[int]) -> Tensor:
    """Give (B, T) bool: from the last occurrence of `sequence` in a document on, or everywhere if the cache holds one."""
    length, n = tokens.before.shape[1], len(sequence)
    ids = torch.cat([tokens.before, tokens.ids], dim=1)
    documents = torch.cat([tokens.documents[:, :1].expand(-1, length), tokens.documents], dim=1)
    if ids.shape[1] < n:
        return torch.zeros_like(tokens.ids, dtype=torch.bool)
    starts = (ids.unfold(1, n, 1) == torch.tensor(sequence, device=ids.device)).all(-1)
    starts &= documents[:, : starts.shape[1]] == documents[:, n - 1 :]
    position = torch.arange(ids.shape[1], device=ids.device)
    found = torch.where(starts, position[: starts.shape[1]], -1)
    last = position.new_full((tokens.count,), -1)
    last = last.scatter_reduce(0, documents[:, : starts.shape[1]].flatten(), found.flatten(), "amax")[documents]
    earlier = starts[:, : max(length - n + 1, 0)].any(1, keepdim=True)
    return (earlier | ((last >= 0) & (position >= last)))[:, length:]


@final
class ALoRAAdapter(AbstractAdapter):
    """The factors A and B of one layer."""

    MERGEABLE: ClassVar[bool] = False
    ROLES: ClassVar[Mapping[str, str]] = {"lora_A": "A", "lora_B": "B"}
    scale: Tensor

    def __init__(self, config: ALoRA, shape: Shape, gate: Gate | None) -> None:
        super().__init__()
        self.config, self.gate = config, gate
        self.lora_A, self.lora_B = factors(shape, config.r)
        self.dropout = dropout(config.dropout)
        scale = scaling(config.r, alpha_or_default(config.r, config.alpha), config.rank_stabilized)
        self.register_buffer("scale", scale, persistent=False)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Fill A and B by the init."""
        if not base.VECTORS:
            raise UsageError(
                "aLoRA cannot adapt a convolution",
                why="what it gives out are not positions of tokens",
                fix="leave it out with exclude_modules",
            )
        scale, init = float(self.scale), self.config.init
        start(self.lora_A, self.lora_B, init, base, scale=scale, one_hot=False, statistics=statistics)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Add s·B(A(dropout(x))) where the adapter is active."""
        y = base.frozen(x)
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        changed = y + (base.mix(base.project(self.dropout(x), A), B) * self.scale.to(B.dtype)).to(y.dtype)
        return changed if self.gate is None else torch.where(self.gate.over(x), changed, y)

    def merge(self, weight: Tensor) -> Tensor:
        """Raise UsageError."""
        raise UsageError(
            "aLoRA cannot be merged",
            why="the tokens in front of the invocation tokens are for the base weights, which would be gone",
            fix="keep it beside the model, or train LoRA, which can be merged",
        )


METHOD = ALoRA
