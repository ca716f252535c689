"""The operations of `choice.py` on random inputs of a model's widths, forward and backward, as a training step runs them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .choice import Trial
from .cross_entropy import WHOLE, usual
from .gated import Activation

ROWS = 2048


class Place(NamedTuple):
    """Where and in what dtype it runs, and for how many tokens."""

    device: torch.device
    dtype: torch.dtype
    rows: int = ROWS

    def draw(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Give normal numbers, the same ones each time."""
        generator = torch.Generator(self.device).manual_seed(0)
        return [torch.randn(s, generator=generator, dtype=self.dtype, device=self.device) for s in shapes]


def norm(place: Place, width: int, *, wide: bool) -> Trial:
    """RMSNorm before a projection."""

    def make() -> list[Tensor]:
        x, weight, dh = place.draw((place.rows, width), (width,), (place.rows, width))
        return [x, weight.float() if wide else weight, dh]

    def run(operation: Any, inputs: list[Tensor]) -> list[Tensor]:
        x, weight, dh = inputs
        prologue = operation(weight, 1e-6, wide=wide)
        h, way = prologue.forward([x])
        return [h, *prologue.backward(dh, way)]

    return Trial("norm", make, run)


def gate(place: Place, width: int, activation: Activation) -> Trial:
    """The gate before the down projection."""

    def run(operation: Any, inputs: list[Tensor]) -> list[Tensor]:
        prologue = operation(activation)
        h, way = prologue.forward(inputs[:2])
        return [h, *prologue.backward(inputs[2], way)]

    return Trial("gate", lambda: place.draw(*[(place.rows, width)] * 3), run)


def rotation(place: Place, heads: int, d: int) -> Trial:
    """The rotation of the queries of one packed row."""

    def make() -> list[Tensor]:
        t = place.rows
        x, dy, angle = place.draw((1, t, heads, d), (1, heads, t, d), (1, t, d // 2))
        angle = angle.repeat(1, 1, 2)
        return [x, angle.cos(), angle.sin(), dy]

    @torch.enable_grad()
    def run(operation: Any, inputs: list[Tensor]) -> list[Tensor]:
        x, cos, sin, dy = inputs
        x = x.detach().requires_grad_()
        y = operation(x, cos, sin)
        return [y.detach(), *torch.autograd.grad(y, x, dy)]

    return Trial("rotate", make, run)


def softmax(place: Place, vocabulary: int) -> Trial:
    """The softmax of a chunk of logits."""

    def make() -> list[Tensor]:
        count = min(place.rows, WHOLE.rows(vocabulary, place.dtype.itemsize))
        (logits,) = place.draw((count, vocabulary))
        return [logits.mul_(3), torch.arange(count, device=place.device) * 7919 % vocabulary]

    def run(operation: Any, inputs: list[Tensor]) -> list[Tensor]:
        logits, targets = inputs
        return [(operation or usual(logits.device)).run(logits, targets, _never), logits]

    return Trial("softmax", make, run)


def _never(lost: Tensor) -> Tensor:
    raise RuntimeError("a softmax that looks at probabilities is a processor's")
