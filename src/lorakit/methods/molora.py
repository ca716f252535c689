"""MoLoRA: Pushing Mixture of Experts to the Limit. Zadouri et al. 2023, https://arxiv.org/abs/2309.05444
Sparse routing and its balance after MixLoRA, Li et al. 2024, https://arxiv.org/abs/2404.15159

    y' = W x + b + s·sum_i p_i B_i A_i x       p = softmax(R x), for each token
    A: (n, r, in)   B: (n, out, r) starts at 0   R: (n, in) the router   s = alpha/r

With `top_k` only the k largest p_i of a token count, divided by their sum; the others are zero. So that all experts get
work, the controller of the same name then puts a penalty on the loss:

    balance · n · sum_i F_i P_i     F_i: share of the choices that fell on i   P_i: mean of p_i before the choice

over all positions of a micro-batch, the mean over the layers and micro-batches of a step; evenly spread it is `balance`.
F is a constant to the gradient. The penalty's gradient joins that of the loss where p is computed (`_Penalised`), so
that nothing of a forward pass has to be kept, also when activations are recomputed. Positions that are padding count.

Departures from the papers: a router on each layer's own input and on every targeted layer (MixLoRA has one for a whole
feed-forward network and plain LoRA on attention). The router has no bias. Dropout is on the input of A, the router sees
none. A starts as LoRA's does. F is divided by k, so that the penalty does not depend on it. All experts are computed.

It cannot be merged, for each token has a matrix of its own; with one expert it is LoRA, and can.

When: the data are several tasks at once, and one LoRA has to compromise between them. It costs the parameters and the
work of a LoRA of rank num_experts·r, for good.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, Base, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ._experts import channel_dim, mix_experts
from ._factors import alpha_or_default, check, dropout, scaling, start, starts_off_zero

ROUTER_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class MoLoRA:
    """Several LoRAs a layer, and a router that weighs them for each token.

    num_experts: number of LoRAs n
    top_k: how many of them a token uses; all of them if not given
    r: rank of each
    alpha: scale, 2r if not given
    dropout: on the input of A
    rank_stabilized: divide alpha by sqrt(r) instead of r
    init: start value of A and B; one that starts from factors of W is refused
    """

    num_experts: int = 4
    top_k: int | None = None
    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    init: str = "kaiming"

    def __post_init__(self) -> None:
        check(self.r, self.alpha, self.dropout)
        if self.num_experts < 1:
            raise UsageError(f"num_experts must be at least 1, not {self.num_experts}")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise UsageError(f"top_k must be from 1 to num_experts = {self.num_experts}, not {self.top_k}")
        if starts_off_zero(self.init):
            raise UsageError(
                f"init {self.init!r} and MoLoRA do not go together",
                why="it starts from factors of W, the same in every expert, to be taken off again by one more",
                fix="take an init that starts B at zero, such as kaiming",
            )

    def at(self, r: int, alpha: float | None) -> "MoLoRA":
        """Give the same with another rank and alpha."""
        return replace(self, r=r, alpha=alpha)

    def build(self, shape: Shape) -> "MoLoRAAdapter":
        """Make the adapter of one layer; its own config has alpha as a number."""
        return MoLoRAAdapter(replace(self, alpha=alpha_or_default(self.r, self.alpha)), shape)


@final
class MoLoRAAdapter(AbstractAdapter):
    """The experts and the router of one layer."""

    MERGEABLE: ClassVar[bool] = False
    ROLES: ClassVar[Mapping[str, str]] = {"router": "other", "lora_A": "A", "lora_B": "B"}
    FAST_IN_EMBEDDING: ClassVar[str] = "A"
    config: MoLoRA
    scale: Tensor
    balance: Tensor
    """Factor of the penalty in a forward pass; zero until a controller says otherwise."""

    def __init__(self, config: MoLoRA, shape: Shape) -> None:
        super().__init__()
        self.config, self.one_hot = config, shape.one_hot
        n, r = config.num_experts, config.r
        self.router = nn.Parameter(torch.empty(n, shape.in_features))
        self.lora_A = nn.Parameter(torch.empty(n, r, shape.in_features))
        self.lora_B = nn.Parameter(torch.empty(n, shape.out_features, r))
        self.dropout = dropout(config.dropout)
        scale = scaling(r, alpha_or_default(r, config.alpha), config.rank_stabilized)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("balance", torch.tensor(0.0), persistent=False)

    @torch.no_grad()
    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Fill each expert by the init, the router with a normal of deviation 0.02: the start is the base layer."""
        for A, B in zip(self.lora_A, self.lora_B, strict=True):
            scale, init = float(self.scale), self.config.init
            start(A, B, init, base, scale=scale, one_hot=self.one_hot, statistics=statistics)
        self.router.normal_(std=ROUTER_STD)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Run the layer and add the experts, weighed for each token."""
        y = base.frozen(x)
        A, B, router = self.lora_A, self.lora_B, self.router
        if x.is_floating_point():  # token ids are not dropped
            A, B, router = A.to(x.dtype), B.to(x.dtype), router.to(x.dtype)
        dim = channel_dim(base, router[:, 0])
        weights = self.weights(base.project(x, router), dim)
        delta = mix_experts(self.dropout(x) if x.is_floating_point() else x, base, A, B, weights, dim)
        return y + (delta * self.scale.to(delta.dtype)).to(y.dtype)

    def weights(self, logits: Tensor, dim: int) -> Tensor:
        """Give p for the router's logits, whose n channels are in dimension `dim`; at least in fp32."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        k = self.config.top_k
        if k is None:
            return logits.softmax(dim)
        best = logits.detach().topk(k, dim).indices
        chosen = torch.zeros_like(logits).scatter(dim, best, 1.0)
        if self.training and torch.is_grad_enabled():
            penalty = self.balance * balance_loss(logits.softmax(dim), chosen, dim)
            logits = _Penalised.apply(logits, penalty)
        return logits.masked_fill(chosen == 0, -torch.inf).softmax(dim)

    def merge(self, weight: Tensor) -> Tensor:
        """Add s·B·A of the only expert. Raises UsageError if there are several."""
        if not self.mergeable():
            raise UsageError(
                f"{self.config.num_experts} experts cannot be merged",
                why="their weights are another for each token, so no one matrix computes the same",
                fix="keep the adapter beside the model, or train LoRA, which can be merged",
            )
        return weight + (self.scale * (self.lora_B[0] @ self.lora_A[0])).to(weight.dtype)

    def mergeable(self) -> bool:
        """Whether there is one expert only: its weight is 1 for every token."""
        return self.config.num_experts == 1


def balance_loss(p: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """Give n · sum_i F_i P_i: 1 if choices or probabilities are spread evenly, up to n if all tokens want the same expert.

    p: probabilities, n channels in dimension `dim`. chosen: 1 where a token uses an expert, else 0, in the same form.
    """
    positions = [d for d in range(p.dim()) if d != p.dim() + dim]
    F = chosen.sum(positions) / chosen.sum()
    P = p.mean(positions) if positions else p
    return len(P) * (F * P).sum()


class _Penalised(torch.autograd.Function):
    """Gives its first argument; in the backward pass the penalty gets the gradient 1, as a term of the loss would."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, penalty: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(penalty))
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], ctx.saved_tensors[0]


METHOD = MoLoRA
