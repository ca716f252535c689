"""The cross entropy of a frozen head, without ever holding the logits.

    loss_i = logsumexp(W h_i) - (W h_i)[y_i]        h: (n, d)   W: (vocabulary, d)   dh = (softmax(W h) - onehot(y)) W

The logits of one chunk of rows are there at a time, and become the probabilities in place; the gradient of h is computed on
the way, while they are there, and scaled when the backward pass comes. So 49,152 logits a token, three or four times over in
fp32 in an ordinary loop, are never stored.

How a chunk becomes probabilities depends on the device. A processor takes a few rows at a time, which stay in its cache, and looks
whether a probability was lost; anything else takes all rows at once and never looks, as a look would make it wait.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gemm import linear, linear_back

BLOCK = 16  # rows whose softmax is taken at once, in fp32: they stay in the cache
_LEAST = 1e-30  # probabilities below are taken from logits anew: fp32 loses them

Again = Callable[[Tensor], Tensor]  # gives the logits of the rows where a mask (n,) is true once more


class Softmax(NamedTuple):
    """A way to make a chunk of logits (n, vocabulary) probabilities.

    run: overwrites the logits and gives -log p of each row's target (n,), in fp32 (fp64 for fp64)
    chunk: bytes of a chunk's logits
    most: rows of a chunk at the most
    """

    run: Callable[[Tensor, Tensor, Again], Tensor]
    chunk: int
    most: int

    def rows(self, vocabulary: int, size: int) -> int:
        """How many rows a chunk has, whose logits take `size` bytes each."""
        return max(64, min(self.most, self.chunk // (vocabulary * size)))


def cross_entropy(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Give the sum over rows, a scalar in fp32 (fp64 for fp64)."""
    return row_losses(h, weight, targets).sum()


def row_losses(h: Tensor, weight: Tensor, targets: Tensor, softmax: Softmax | None = None) -> Tensor:
    """Give the loss of each row (n,), in fp32 (fp64 for fp64). `softmax`: None for the usual one of the device."""
    return cast(Tensor, _CrossEntropy.apply(h, weight, targets, softmax or usual(h.device)))


def usual(device: torch.device) -> Softmax:
    """Give the softmax in torch's operations for a device; without data, a processor's."""
    return BLOCKS if device.type in ("cpu", "meta") else WHOLE


def reference(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the same with all logits."""
    logits = F.linear(h, weight)
    return F.cross_entropy(logits.to(torch.promote_types(h.dtype, torch.float32)), targets, reduction="sum")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, softmax: Softmax) -> Tensor:
        wide = torch.promote_types(h.dtype, torch.float32)
        losses = h.new_empty(len(h), dtype=wide)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        count = softmax.rows(len(weight), h.element_size())
        for start in range(0, len(h), count):
            rows, y = h[start : start + count], targets[start : start + count]
            p = linear(rows, weight)
            losses[start : start + count] = softmax.run(p, y, lambda lost, rows=rows: linear(rows[lost], weight))
            if dh is not None:
                dh[start : start + count] = linear_back(p, weight).sub_(weight[y])
        ctx.save_for_backward(*([] if dh is None else [dh]))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (dh,) = ctx.saved_tensors
        return dh * grad.to(dh.dtype)[:, None], None, None, None


def _by_blocks(logits: Tensor, targets: Tensor, again: Again) -> Tensor:
    """The processor's way."""
    return _surprise(_softmax(logits, targets), targets, again)


def _softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Make the logits probabilities, in place; give those of the targets (n,), before they are rounded to the logits' dtype."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    own = logits.new_empty(len(logits), dtype=dtype)
    buffer = (
        None if logits.dtype == dtype else logits.new_empty((min(BLOCK, len(logits)), logits.shape[1]), dtype=dtype)
    )
    for start in range(0, len(logits), BLOCK):
        rows = logits[start : start + BLOCK]
        p = rows if buffer is None else buffer[: len(rows)].copy_(rows)
        torch.ops.aten._softmax.out(p, -1, False, out=p)
        own[start : start + BLOCK] = p.gather(1, targets[start : start + BLOCK, None])[:, 0]
        if buffer is not None:
            rows.copy_(p)
    return own


def _surprise(p: Tensor, targets: Tensor, again: Again) -> Tensor:
    """Give -log p of each row, of rows whose probability is lost in fp32 from their logits."""
    lost = p < _LEAST
    losses = -p.log()
    if not p.is_meta and bool(lost.any()):
        losses[lost] = F.cross_entropy(again(lost).to(p.dtype), targets[lost], reduction="none")
    return losses


def _at_once(logits: Tensor, targets: Tensor, again: Again) -> Tensor:
    """Any other device's way: nothing is asked of the values, so it can wait in a queue or be recorded in a CUDA graph."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    surprise = torch.log_softmax(logits, -1, dtype=dtype)
    losses = -surprise.gather(1, targets[:, None])[:, 0]
    logits.copy_(surprise.exp_())
    return losses


# 32 MB of logits: enough rows for a processor's matrix product at full speed, and a heap block that is reused.
BLOCKS = Softmax(_by_blocks, chunk=32 << 20, most=256)
WHOLE = Softmax(_at_once, chunk=256 << 20, most=1 << 31)
