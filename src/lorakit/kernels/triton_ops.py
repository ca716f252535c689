"""Triton versions of the four operations that wait for memory: the norm, the gate, the rotation and the softmax of the loss.

The same formulas and protocols as `norm.py`, `gated.py`, `rotary.py` and `cross_entropy.py`, each going forward and each going back
in one kernel: every number is read once and written once (the softmax reads its logits twice), with fp32 in between. Importing this
file needs triton. `choice.py` decides on the machine at hand whether anything of it is used; fp64 is not for it.

Offsets are 64-bit wherever rows times columns may pass 2^31.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gated import GELU_TANH, SILU, Activation

_ELEMENTS = 1024  # of a gate that one program takes
_VOCABULARY = 4096  # logits that one program holds at a time
_GELU = {SILU: False, GELU_TANH: True}


class RMSNorm:
    """`norm.RMSNorm`; a program takes a row."""

    recomputes = True

    def __init__(self, weight: Tensor, eps: float, *, wide: bool = False) -> None:
        self.weight, self.eps, self.wide = weight.contiguous(), eps, wide

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Give h, and with it x and 1 / rms (rows,) in fp32."""
        x, n = inputs[0].contiguous(), inputs[0].shape[-1]
        h, inverse = torch.empty_like(x), x.new_empty(x.numel() // n, dtype=torch.float32)
        _launch(_norm_forward, len(inverse), x, self.weight, h, inverse, n, self.eps, WIDE=self.wide, **_whole(n))
        return h, (x, inverse)

    def backward(self, dh: Tensor, way: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Give dx = (g - y mean(g y)) / rms, g = w dh, in the memory of dh."""
        (x, inverse), dx, n = way, dh.contiguous(), dh.shape[-1]
        _launch(_norm_backward, len(inverse), dx, x, self.weight, inverse, n, WIDE=self.wide, **_whole(n))
        return (dx,)


class Gated:
    """`gated.Gated`, of the two activations there are; a program takes 1,024 numbers wherever they lie."""

    recomputes = True

    def __init__(self, activation: Activation) -> None:
        self.gelu = _GELU[activation]

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Give h, and with it gate and up."""
        gate, up = (x.contiguous() for x in inputs)
        h = torch.empty_like(gate)
        _launch(_gate_forward, _pieces(h), gate, up, h, h.numel(), GELU=self.gelu, BLOCK=_ELEMENTS)
        return h, (gate, up)

    def backward(self, dh: Tensor, way: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Give d gate = act'(gate) up dh, in the memory of dh, and d up = act(gate) dh."""
        (gate, up), dgate, dup = way, dh.contiguous(), torch.empty_like(way[1])
        _launch(_gate_backward, _pieces(dup), dgate, gate, up, dup, dup.numel(), GELU=self.gelu, BLOCK=_ELEMENTS)
        return dgate, dup


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Give y (B, heads, T, D) for x (B, T, heads, D), cos and sin (B, T, D) or (1, T, D): `rotary.rotate`."""
    return cast(Tensor, _Rotate.apply(x, cos, sin))


def softmax(logits: Tensor, targets: Tensor, again: object = None) -> Tensor:
    """Make logits (n, vocabulary), rows that lie together, probabilities in place; give -log p of the targets (n,) in fp32."""
    (rows, count), losses = logits.shape, logits.new_empty(len(logits), dtype=torch.float32)
    block = min(_power_of_2(count), _VOCABULARY)
    _launch(_softmax, rows, logits, targets, losses, logits.stride(0), count, BLOCK=block, num_warps=8)
    return losses


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        b, t, heads, d = x.shape
        y = x.new_empty(b, heads, t, d)
        _turn(x, y.transpose(1, 2), cos, sin, back=False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        b, heads, t, d = dy.shape
        dx = dy.new_empty(b, t, heads, d)
        _turn(dy.transpose(1, 2), dx, *ctx.saved_tensors, back=True)
        return dx, None, None


def _turn(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> None:
    """Write y, rotated, for x, both (B, T, heads, D) in any order of memory; the last dimension of y lies together."""
    b, t, heads, d = x.shape
    if d % 2 or cos.shape[1:] != (t, d) or cos.shape != sin.shape:
        raise ValueError(f"no rotation of {tuple(x.shape)} by {tuple(cos.shape)}")
    x, cos, sin = (z if z.stride(-1) == 1 else z.contiguous() for z in (x, cos.expand(b, t, d), sin.expand(b, t, d)))
    strides = [s for z in (x, y) for s in z.stride()[:3]] + [s for z in (cos, sin) for s in z.stride()[:2]]
    tile = {"HEADS": _power_of_2(heads), "HALF": _power_of_2(d // 2)}
    _launch(_rotate, b * t, x, y, cos, sin, t, heads, d // 2, *strides, BACK=back, **tile)


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument."""
    if not programs:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, enable_fp_fusion=True, **constants)  # a default that changes in Triton 3.10


def _whole(n: int) -> dict[str, int]:
    """How a program holds a whole row."""
    block = _power_of_2(n)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _pieces(x: Tensor) -> int:
    return -(-x.numel() // _ELEMENTS)


def _power_of_2(n: int) -> int:
    """Give the next one."""
    return 1 << (n - 1).bit_length()


@triton.jit
def _norm_forward(x, w, h, inverse, n, eps, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < n
    own = tl.load(x + row * n + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(own * own, 0) / n + eps)
    y, weight = own * scale, tl.load(w + at, mask=inside, other=0.0)
    narrow = h.dtype.element_ty
    if not WIDE:  # Llama's order: y and w are rounded before they meet
        y, weight = y.to(narrow).to(tl.float32), weight.to(narrow)
    tl.store(h + row * n + at, (y * weight.to(tl.float32)).to(narrow), mask=inside)
    tl.store(inverse + row, scale)


@triton.jit
def _norm_backward(dh, x, w, inverse, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < n
    narrow = dh.dtype.element_ty
    weight = tl.load(w + at, mask=inside, other=0.0)
    if not WIDE:
        weight = weight.to(narrow)
    g = tl.load(dh + row * n + at, mask=inside, other=0.0).to(tl.float32) * weight.to(tl.float32)
    scale = tl.load(inverse + row)
    y = tl.load(x + row * n + at, mask=inside, other=0.0).to(tl.float32) * scale
    dx = (g - y * (tl.sum(g * y, 0) / n)) * scale
    tl.store(dh + row * n + at, dx.to(narrow), mask=inside)


@triton.jit
def _sigmoid_and_slope(x, GELU: tl.constexpr):
    """Give s and d(x s)/dx: both activations are x s(k(x)), s the sigmoid, as (1 + tanh z) / 2 is s(2 z)."""
    k, slope = x, 1.0
    if GELU:
        k = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    t = tl.exp(-tl.abs(k))  # of the size only: nothing overflows, and t r is 1 - s without its cancellation
    r = 1.0 / (1.0 + t)
    s = tl.where(k < 0, t * r, r)
    return s, s + x * (t * r * r) * slope


@triton.jit
def _gate_forward(gate, up, h, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    s, _ = _sigmoid_and_slope(x, GELU)
    y = x * s * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + at, y.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(dh, gate, up, dup, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    narrow = dh.dtype.element_ty
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    s, slope = _sigmoid_and_slope(x, GELU)
    g = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dup + at, (x * s * g).to(narrow), mask=inside)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dh + at, (slope * u * g).to(narrow), mask=inside)


@triton.jit(do_not_specialize=["t"])  # the number of tokens changes from step to step
def _rotate(
    x, y, cos, sin, t, heads, half,
    xb, xt, xh, yb, yt, yh, cb, ct, sb, st,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A program takes all heads of a token: a tile (heads, half of the dimension) for either half."""
    token = tl.program_id(0)
    b, i = (token // t).to(tl.int64), (token % t).to(tl.int64)
    head, at = tl.arange(0, HEADS).to(tl.int64)[:, None], tl.arange(0, HALF)[None, :]
    column = at < half
    inside = (head < heads) & column
    cos += b * cb + i * ct + at
    sin += b * sb + i * st + at
    c1 = tl.load(cos, mask=column, other=0.0).to(tl.float32)
    c2 = tl.load(cos + half, mask=column, other=0.0).to(tl.float32)
    s1 = tl.load(sin, mask=column, other=0.0).to(tl.float32)
    s2 = tl.load(sin + half, mask=column, other=0.0).to(tl.float32)
    if BACK:  # the transposed rotation
        s1, s2 = -s2, -s1
    x += b * xb + i * xt + head * xh + at
    y += b * yb + i * yt + head * yh + at
    x1 = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(y, (x1 * c1 - x2 * s1).to(y.dtype.element_ty), mask=inside)
    tl.store(y + half, (x2 * c2 + x1 * s2).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _softmax(logits, targets, losses, stride, count, BLOCK: tl.constexpr):
    """A program takes a row: its maximum m and s = sum exp(x - m) on the way once, p = exp(x - m) / s on the second."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits += row * stride
    own = tl.load(logits + tl.load(targets + row)).to(tl.float32)  # before anything is overwritten
    m, s = -3.0e38, 0.0  # no infinity: a block of logits may be -inf altogether
    for start in range(0, count, BLOCK):
        x = tl.load(logits + start + at, mask=start + at < count, other=-float("inf")).to(tl.float32)
        top = tl.maximum(m, tl.max(x, 0))
        s = s * tl.exp(m - top) + tl.sum(tl.exp(x - top), 0)
        m = top
    tl.store(losses + row, tl.log(s) - (own - m))  # in this order: of a sure row m is own, and log s all there is
    for start in range(0, count, BLOCK):
        x = tl.load(logits + start + at, mask=start + at < count, other=-float("inf")).to(tl.float32)
        p = tl.exp(x - m) / s
        tl.store(logits + start + at, p.to(logits.dtype.element_ty), mask=start + at < count)
