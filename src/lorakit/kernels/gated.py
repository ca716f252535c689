"""The gate of a feed-forward layer as the prologue of its down projection: h = act(gate) * up (Shazeer 2020, arXiv:2002.05202).

gate and up are kept, as they come out of their projections; h and the activation are made again in the backward pass.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation:
    """An activation and its gradient g -> g act'(x)."""

    def __init__(self, act: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.act, self.back = act, back


SILU = Activation(F.silu, torch.ops.aten.silu_backward)
GELU_TANH = Activation(
    lambda x: F.gelu(x, approximate="tanh"), lambda g, x: torch.ops.aten.gelu_backward(g, x, approximate="tanh")
)


class Gated:
    """h = act(gate) * up of the inputs (gate, up)."""

    recomputes = True

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Give h, and with it gate, up and act(gate)."""
        gate, up = inputs
        act = self.activation.act(gate)
        return act * up, (gate, up, act)

    def backward(self, dh: Tensor, way: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Give d gate = act'(gate) up dh and d up = act(gate) dh."""
        gate, up, act = way
        dup = act.mul_(dh)
        return self.activation.back(dh.mul_(up), gate), dup


def reference(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Compute the same, differentiable."""
    return activation.act(gate) * up
