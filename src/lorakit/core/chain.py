"""An adapter in front of a frozen low-rank term: links of a chain that were trained before, or the start that is taken off again.

    delta = live.delta + s * frozen_B frozen_A

CoLA, ReLoRA and PLoRA append what they have trained and start the live adapter anew: the function does not change, nothing
is rounded into the base (which may be stored in 4 bits), and the whole is one LoRA of the ranks' sum when it is saved.
PiSSA, OLoRA, MiLoRA, CorDA and LoRA-GA start from factors of W itself: with the frozen term at minus the start the base stays
untouched and the model at the start is the base model, bit for bit. Their papers subtract the start from the base weight
instead, which is the same function and the same gradients.
"""

from typing import ClassVar, cast, final

import torch
from torch import Tensor, nn

from ..kernels.low_rank import LowRank
from .adapter import AdditiveAdapter, Base
from .statistics import Statistics


@final
class Chain(AdditiveAdapter):
    """A live additive adapter with factors lora_A (r, in), lora_B (out, r) and `scale`, and the frozen factors behind it."""

    ROLES: ClassVar = {"frozen_A": "frozen", "frozen_B": "frozen"}

    def __init__(self, live: AdditiveAdapter, *, start_off: bool = False) -> None:
        """`start_off`: take the start off again, for starts that are not zero (PiSSA and its like)."""
        super().__init__()
        self.live, self.config, self.start_off = live, live.config, start_off
        A, B = self.factors()
        r = len(A) if start_off else 0  # room for the start, so that the shapes are known before it is
        self.frozen_A = nn.Parameter(A.detach().new_zeros(r, A.shape[1]), requires_grad=False)
        self.frozen_B = nn.Parameter(B.detach().new_zeros(B.shape[0], r), requires_grad=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Give the live A and B."""
        return self.live.get_parameter("lora_A"), self.live.get_parameter("lora_B")

    @property
    def scale(self) -> Tensor:
        """Give s, that of the live adapter."""
        return cast(Tensor, self.live.scale)

    @torch.no_grad()
    def freeze(self, sign: float = 1.0) -> None:
        """Append the live factors, times `sign`, to the frozen ones. The live ones stay as they are: start them anew."""
        A, B = self.factors()
        self.frozen_A = nn.Parameter(torch.cat([self.frozen_A, A]), requires_grad=False)
        self.frozen_B = nn.Parameter(torch.cat([self.frozen_B, sign * B], dim=1), requires_grad=False)

    @torch.no_grad()
    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start the live adapter, and take its start off if asked to."""
        self.live.start(base, statistics)
        if self.start_off:
            A, B = self.factors()
            self.frozen_A.copy_(A)
            self.frozen_B.copy_(-B)

    def delta_weight(self) -> Tensor:
        """Give the live change plus the frozen one."""
        return self.live.delta_weight() + self.scale * (self.frozen_B @ self.frozen_A)

    def low_rank(self, base: Base) -> LowRank | None:
        """Give the live factors and the frozen ones as one pair, unless only the live ones see dropout."""
        live = self.live.low_rank(base)
        if live is None or not len(self.frozen_A):
            return live
        if live.dropout:
            return None
        return live._replace(A=torch.cat([live.A, self.frozen_A]), B=torch.cat([live.B, self.frozen_B], dim=1))

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give the live change plus the frozen one, which sees no dropout: it is part of what is adapted."""
        live, A, B = self.live.delta(x, base), self.frozen_A, self.frozen_B
        if not len(A):  # nothing frozen yet, and a convolution to no channels is an error
            return live
        if x.is_floating_point():
            A, B = A.to(x.dtype), B.to(x.dtype)
        return live + base.mix(base.project(x, A), B) * self.scale.to(B.dtype)

    def roles(self) -> dict[str, str]:
        """Give the live adapter's roles, and the frozen factors."""
        return {**{f"live.{name}": role for name, role in self.live.roles().items()}, **self.ROLES}
