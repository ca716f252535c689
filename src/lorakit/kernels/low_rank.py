"""Linear layers with a low-rank change, several at once if they share their input, in one operation.

    h   = prologue(inputs)                                  the norm before q, k, v; the gate before the down projection; nothing
    y_i = h W_i^T + s_i (drop(h) A_i^T) B_i^T + b_i         W_i: (out_i, in) frozen   A_i: (r_i, in)   B_i: (out_i, r_i)
    y_1 + residual, if there is one

What it saves for the backward pass is `inputs`, which are the caller's anyway, s h A^T (rows, sum of r) and the factors in the
dtype of h. h, dequantized weights and dropout masks (from the generator's state) are made again. The A of layers that share their
input are one matrix, so h is read once by one product; d h A is computed once for dA and dh. Backward, with dy_i:

    g_i = s_i dy_i B_i    dB_i = dy_i^T (s_i drop(h) A_i^T)    dA_i = g_i^T drop(h)    dh = sum_i dy_i W_i + drop'(g_i A_i)

The factors may be fp32 on a bf16 base: they are rounded to the dtype of h for the products. Not differentiable twice:
`with plain():` runs everything the ordinary way.

`add` is the same for one layer whose own product is done by the layer.

Several adapters at once are the same again, row by row: of a `Routed` change each span of rows has its own A_i, B_i and s_i,
and only they go span by span; the products with W_i take all rows.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gemm import linear, linear_back
from .spans import Change, LowRank, Routed, Span, each, spans_of


class Projection(NamedTuple):
    """A linear layer: `matrix()` gives the frozen W (out, in), dequantized anew if it is stored in fewer bits.

    Such a W is there for one product: the next one may be put in its place.
    """

    matrix: Callable[[], Tensor]
    bias: Tensor | None
    change: Change | None

    @property
    def gain(self) -> Tensor | None:
        """What the rows of W are scaled by, if by anything."""
        return self.change.gain if isinstance(self.change, LowRank) else None


class Prologue(Protocol):
    """What makes h (n, in) of the saved inputs, and how its gradient goes back to them."""

    recomputes: bool
    """Whether `backward` needs the inputs."""

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Give h, and what of the way there `backward` can use."""
        ...

    def backward(self, dh: Tensor, way: Any) -> tuple[Tensor, ...]:
        """Give the gradients of the inputs. `dh` may be overwritten."""
        ...


class Same:
    """h is the input itself."""

    recomputes = False

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, None]:
        """Give the input."""
        return inputs[0], None

    def backward(self, dh: Tensor, way: None) -> tuple[Tensor, ...]:
        """Give it back."""
        return (dh,)


SAME = Same()


_FUSED = ContextVar("fused", default=True)


@contextmanager
def plain() -> Generator[None]:
    """Run everything inside `with plain():` by torch's own operations: for second derivatives, and to compare."""
    token = _FUSED.set(False)
    try:
        yield
    finally:
        _FUSED.reset(token)


def applies(x: Tensor) -> bool:
    """Whether the fused operations are to be used for an input like `x`: in eager training.

    Without gradients there is nothing to save, and the ordinary way adds in the order that other tools do; torch.compile
    fuses by itself; autocast and torch.func know only torch's own operations.
    """
    return (
        not torch.compiler.is_compiling()
        and _FUSED.get()
        and torch.is_grad_enabled()
        and x.is_floating_point()
        and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
        and not torch._C._are_functorch_transforms_active()
    )


def add(y: Tensor, x: Tensor, change: Change) -> Tensor:
    """Give y + s (drop(x) A^T) B^T for y (..., out) and x (..., in) of one dtype, in the memory of y if y has its own."""
    if y._is_view():  # of what another autograd function made, which forbids changing it in place
        y = y.clone()
    spans, factors = spans_of(y.numel() // y.shape[-1], [change])
    return cast(Tensor, _Add.apply(spans, y, x, *factors))


def project(
    inputs: Sequence[Tensor],
    projections: Sequence[Projection],
    *,
    prologue: Prologue = SAME,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """Give y_i (..., out_i) of every projection; `inputs` are (..., n_j), `residual` is (..., out_1)."""
    lead = inputs[0].shape[:-1]
    scaled = any(p.gain is not None for p in projections)
    biased = residual is None and not scaled
    spans, factors = spans_of(math.prod(lead), [p.change for p in projections])
    biases = [p.bias if biased else None for p in projections]
    call = _Call(prologue, [p.matrix for p in projections], biases, spans, len(inputs))
    flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
    rest = residual.reshape(-1, residual.shape[-1]) if residual is not None and not scaled else None
    outs = cast(Sequence[Tensor], _Project.apply(call, rest, *flat, *factors))
    ys = [y.view(*lead, y.shape[-1]) for y in outs]
    if biased:
        return ys
    for i, p in enumerate(projections):
        if p.gain is not None:
            ys[i] = ys[i] * p.gain.to(ys[i].dtype)
        if p.bias is not None:
            ys[i] = ys[i] + p.bias
    if residual is not None and scaled:
        ys[0] = residual + ys[0]
    return ys


def reference(
    inputs: Sequence[Tensor],
    projections: Sequence[Projection],
    *,
    prologue: Prologue = SAME,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """Compute the same, operation by operation. Its prologue must be differentiable."""
    (h, _), ys = prologue.forward(inputs), []
    for p in projections:
        y = F.linear(h, p.matrix())
        if isinstance(p.change, Routed):
            spans = h.split(list(p.change.runs[math.prod(h.shape[:-1])]), dim=-2)
            changes = zip(spans, p.change.changes, strict=True)
            y = y + torch.cat([_reference(x, change) for x, change in changes], dim=-2)
        elif p.change is not None:
            y = y + _reference(h, p.change)
        if p.gain is not None:
            y = y * p.gain.to(y.dtype)
        ys.append(y if p.bias is None else y + p.bias)
    if residual is not None:
        ys[0] = ys[0] + residual
    return ys


def _reference(x: Tensor, change: LowRank) -> Tensor:
    if change.dropout:
        x = F.dropout(x, change.dropout)
    A, B = change.A.to(x.dtype), change.B.to(x.dtype)
    return F.linear(F.linear(x, A), B) * change.scale.to(x.dtype)


@dataclass(frozen=True)
class _Call:
    """What an operation is, without the tensors that can have gradients; lists over projections."""

    prologue: Prologue
    matrices: list[Callable[[], Tensor]]
    biases: list[Tensor | None]
    spans: list[Span]
    inputs: int


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, residual: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, factors = tensors[: call.inputs], tensors[call.inputs :]
        h = call.prologue.forward(inputs)[0]  # what it used on the way is as large as h, and goes
        As, Bs = [A.to(h.dtype) for A in factors[::2]], [B.to(h.dtype) for B in factors[1::2]]
        ys, shrunk = [linear(h, matrix().to(h.dtype)) for matrix in call.matrices], []
        for span, own_A, own_B in each(call.spans, As, Bs):
            us = span.shrink(h, own_A)
            span.grow(ys, us, own_B)
            shrunk += us
        for y, bias in zip(ys, call.biases, strict=True):
            if bias is not None:
                y.add_(bias)
        if residual is not None:
            ys[0].add_(residual)
        ctx.call, ctx.residual = call, residual is not None
        needed = ctx.needs_input_grad[2:]
        ctx.dh, ctx.dA = any(needed[: call.inputs]), any(needed[call.inputs :: 2])
        kept = inputs if ctx.dA or (ctx.dh and call.prologue.recomputes) else ()
        ctx.kept = len(kept)
        ctx.dtypes = [factor.dtype for factor in factors]
        ctx.save_for_backward(*kept, *shrunk, *As, *Bs)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> Any:
        call: _Call = ctx.call
        saved: Sequence[Tensor] = ctx.saved_tensors
        inputs, rest = saved[: ctx.kept], saved[ctx.kept :]
        count = len(rest) // 3
        shrunk, As, Bs = rest[:count], rest[count : 2 * count], rest[2 * count :]
        dys = tuple(dy.contiguous() for dy in dys)
        h, way = call.prologue.forward(inputs) if inputs else (None, None)
        gs, grads = _factor_gradients(call.spans, dys, h if ctx.dA else None, shrunk, Bs)
        needed = ctx.needs_input_grad[2 + call.inputs :]
        own = zip(grads, needed, ctx.dtypes, strict=True)
        factors = [grad.to(dtype) if grad is not None and wanted else None for grad, wanted, dtype in own]
        dxs: tuple[Tensor | None, ...] = (None,) * call.inputs
        if ctx.dh:
            dxs = call.prologue.backward(_back(call, dys, gs, As), way)
        dresidual = dys[0] if ctx.residual and ctx.needs_input_grad[1] else None
        return None, dresidual, *dxs, *factors


def _factor_gradients(
    spans: Sequence[Span], dys: Sequence[Tensor], h: Tensor | None, us: Sequence[Tensor], Bs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Give g_i = s_i dy_i B_i of every change, and dA_i (None without h), dB_i of each in turn."""
    every: list[Tensor] = []
    grads: list[Tensor | None] = []
    for span, own_u, own_B in each(spans, us, Bs):
        own = [dys[i][span.rows] for i in span.of]
        gs = [(dy @ B) * scale.to(dy.dtype) for dy, B, scale in zip(own, own_B, span.scales, strict=True)]
        dAs = [None] * len(gs) if h is None else span.outer(gs, h)
        for dA, dy, u in zip(dAs, own, own_u, strict=True):
            grads += [dA, (u.t() @ dy).t()]  # dy^T u, in two thirds of its time
        every += gs
    return every, grads


def _back(call: _Call, dys: Sequence[Tensor], gs: Sequence[Tensor], As: Sequence[Tensor]) -> Tensor:
    """Give dh."""
    dh: Tensor | None = None
    for dy, matrix in zip(dys, call.matrices, strict=True):
        part = linear_back(dy, matrix().to(dy.dtype))
        dh = part if dh is None else dh.add_(part)
    assert dh is not None
    for span, own_g, own_A in each(call.spans, gs, As):
        span.back(dh, own_g, own_A)
    return dh


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spans: list[Span], y: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        h, flat = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        shrunk = []
        for span, As, Bs in each(spans, factors[::2], factors[1::2]):
            us = span.shrink(h, [A.to(h.dtype) for A in As])
            span.grow([flat], us, [B.to(h.dtype) for B in Bs])
            shrunk += us
        ctx.mark_dirty(y)
        ctx.spans, ctx.shape = spans, x.shape
        ctx.dA = any(ctx.needs_input_grad[3::2])
        ctx.save_for_backward(*shrunk, *factors, *([h] if ctx.dA else []))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        spans: list[Span] = ctx.spans
        saved: Sequence[Tensor] = ctx.saved_tensors
        count = sum(len(span.of) for span in spans)
        us, factors, kept = saved[:count], saved[count : 3 * count], saved[3 * count :]
        As, Bs = ([factor.to(dy.dtype) for factor in own] for own in (factors[::2], factors[1::2]))
        flat = dy.reshape(-1, dy.shape[-1])
        gs, grads = _factor_gradients(spans, [flat], kept[0] if kept else None, us, Bs)
        _, needs_y, needs_x, *needed = ctx.needs_input_grad
        own = zip(grads, needed, factors, strict=True)
        found = [grad.to(factor.dtype) if grad is not None and wanted else None for grad, wanted, factor in own]
        dx = None
        if needs_x:
            dx = flat.new_empty(len(flat), ctx.shape[-1])
            for span, own_g, own_A in each(spans, gs, As):
                span.back(dx, own_g, own_A, fresh=True)
            dx = dx.view(ctx.shape)
        return None, dy if needs_y else None, dx, *found
