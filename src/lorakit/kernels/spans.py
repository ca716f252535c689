"""The low-rank changes of linear layers, and which rows see which: all rows the same, or each span of rows its own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import UsageError
from .gemm import linear


class LowRank(NamedTuple):
    """The change of a linear layer: gain * (W + scale B A), rows scaled by `gain` (out,) if there is one.

    A: (r, in), B: (out, r), scale: (). dropout: probability, on the input of A. generator: draws its masks; torch's own if None.
    """

    A: Tensor
    B: Tensor
    scale: Tensor
    dropout: float = 0.0
    gain: Tensor | None = None
    generator: torch.Generator | None = None


class Routed(NamedTuple):
    """The changes of a linear layer, without gain, each for rows of its own: of n rows the first `runs[n][0]` have
    `changes[0]`, the next `runs[n][1]` have `changes[1]`, and so on.

    By n, because a layer behind the positions that a loss needs sees fewer rows. Layers that share an input share `runs`.
    """

    changes: Sequence[LowRank]
    runs: Mapping[int, Sequence[int]]


Change = LowRank | Routed


class Dropout:
    """Dropout whose mask is drawn as torch's own is, and drawn again from the generator's state for the backward pass."""

    def __init__(self, p: float, generator: torch.Generator | None) -> None:
        self.p, self.generator, self.state = p, generator, torch.empty(0)

    def forward(self, h: Tensor) -> Tensor:
        """Give drop(h) with a new mask."""
        if not self.p:
            return h
        if self.generator is not None:
            self.state = self.generator.get_state()
        else:
            self.state = torch.cuda.get_rng_state(h.device) if h.is_cuda else torch.get_rng_state()
        return h * self._mask(h, self.generator)

    def again(self, h: Tensor) -> Tensor:
        """Give h times the same mask."""
        if not self.p:
            return h
        if h.is_meta:  # nothing to draw, and no generator for it
            return h * self._mask(h, None)
        generator = torch.Generator(h.device)
        generator.set_state(self.state)
        return h * self._mask(h, generator)

    def _mask(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.empty_like(h).bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)


@dataclass(frozen=True)
class Span:
    """Rows that see the same changes, without the tensors that can have gradients; `of`: the projections they belong to."""

    rows: slice
    of: list[int]
    dropouts: list[Dropout]
    scales: list[Tensor]

    @property
    def drops(self) -> bool:
        """Whether anything is dropped, so that the changes do not share their input."""
        return any(dropout.p for dropout in self.dropouts)

    def shrink(self, h: Tensor, As: Sequence[Tensor]) -> list[Tensor]:
        """Give s_i drop(h) A_i^T of every change; one product where nothing is dropped."""
        h = h[self.rows]
        if self.drops:
            parts = [linear(dropout.forward(h), A) for dropout, A in zip(self.dropouts, As, strict=True)]
        else:
            parts = linear(h, _one(As)).split([len(A) for A in As], 1)
        return [part * scale.to(part.dtype) for part, scale in zip(parts, self.scales, strict=True)]

    def grow(self, ys: Sequence[Tensor], us: Sequence[Tensor], Bs: Sequence[Tensor]) -> None:
        """Add u_i B_i^T to these rows of y_i."""
        for i, u, B in zip(self.of, us, Bs, strict=True):
            ys[i][self.rows].addmm_(u, B.t().contiguous())  # half the time that the product with B as it lies takes

    def outer(self, gs: Sequence[Tensor], h: Tensor) -> Sequence[Tensor]:
        """Give dA_i = g_i^T drop(h)."""
        h = h[self.rows]
        if self.drops:
            return [g.t() @ dropout.again(h) for dropout, g in zip(self.dropouts, gs, strict=True)]
        return (_one(gs, 1).t() @ h).split([g.shape[1] for g in gs])

    def back(self, dh: Tensor, gs: Sequence[Tensor], As: Sequence[Tensor], *, fresh: bool = False) -> None:
        """Add drop'(g_i A_i) to these rows of dh; if `fresh`, put it there."""
        dh = dh[self.rows]
        if not self.drops:
            dh.addmm_(_one(gs, 1), _one(As), beta=0 if fresh else 1)
            return
        if fresh:
            dh.zero_()
        for dropout, g, A in zip(self.dropouts, gs, As, strict=True):
            dh.add_(dropout.again(g @ A))


def _one(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


def spans_of(n: int, changes: Sequence[Change | None]) -> tuple[list[Span], list[Tensor]]:
    """Give the spans of n rows and, in their order, the factors A, B of each change: one span, unless they are routed."""
    routed = next((change for change in changes if isinstance(change, Routed)), None)
    if routed is not None and n not in routed.runs:
        raise UsageError(
            f"several adapters run at once, and a layer sees {n} rows of which it is not known whose they are",
            why=f"the batch has {' or '.join(map(str, routed.runs))}; this model gives the layer a choice of them",
            fix="leave such layers out (exclude_modules), or run one adapter at a time",
        )
    runs = [n] if routed is None else routed.runs[n]
    spans, factors, end = [], [], 0
    for k, count in enumerate(runs):
        start, end = end, end + count
        each = [change.changes[k] if isinstance(change, Routed) else change for change in changes]
        own = {i: change for i, change in enumerate(each) if change is not None}
        if own and count:
            dropouts = [Dropout(change.dropout, change.generator) for change in own.values()]
            spans.append(Span(slice(start, end), list(own), dropouts, [change.scale for change in own.values()]))
            factors += [factor for change in own.values() for factor in (change.A, change.B)]
    return spans, factors


def each(spans: Sequence[Span], *lists: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Give each span with its part of lists over all changes."""
    start = 0
    for span in spans:
        yield span, *(own[start : start + len(span.of)] for own in lists)
        start += len(span.of)
