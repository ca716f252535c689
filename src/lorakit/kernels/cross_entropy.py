"""The cross entropy of a frozen head, without ever holding the logits.

    loss_i = logsumexp(W h_i) - (W h_i)[y_i]        h: (n, d)   W: (vocabulary, d)   dh = (softmax(W h) - onehot(y)) W

The logits of one chunk of rows are there at a time, and become the probabilities in place; the gradient of h is computed on
the way, while they are there, and scaled when the backward pass comes. So 49,152 logits a token, three or four times over in
fp32 in an ordinary loop, are never stored.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gemm import linear, linear_back

CHUNK = (
    32 << 20
)  # bytes of a chunk's logits: enough rows for the matrix product's full speed, and a heap block that is reused
BLOCK = 16  # rows whose softmax is taken at once, in fp32: they stay in the cache
_LEAST = 1e-30  # probabilities below are taken from logits anew: fp32 loses them


def cross_entropy(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Give the sum over rows, a scalar in fp32 (fp64 for fp64)."""
    return row_losses(h, weight, targets).sum()


def row_losses(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Give the loss of each row (n,), in fp32 (fp64 for fp64)."""
    return cast(Tensor, _CrossEntropy.apply(h, weight, targets))


def reference(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the same with all logits."""
    logits = F.linear(h, weight)
    return F.cross_entropy(logits.to(torch.promote_types(h.dtype, torch.float32)), targets, reduction="sum")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(h.dtype, torch.float32)
        losses = h.new_empty(len(h), dtype=wide)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        count = max(64, min(256, CHUNK // (len(weight) * h.element_size())))
        for start in range(0, len(h), count):
            rows, y = h[start : start + count], targets[start : start + count]
            p = linear(rows, weight)
            own = _softmax(p, y, wide)
            losses[start : start + count] = _surprise(own, rows, weight, y, wide)
            if dh is not None:
                dh[start : start + count] = linear_back(p, weight).sub_(weight[y])
        ctx.save_for_backward(*([] if dh is None else [dh]))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (dh,) = ctx.saved_tensors
        return dh * grad.to(dh.dtype)[:, None], None, None


def _softmax(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Make the logits probabilities, in place; give those of the targets (n,), before they are rounded to the logits' dtype."""
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


def _surprise(p: Tensor, h: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Give -log p of each row, of rows whose probability is lost in fp32 from their logits."""
    lost = p < _LEAST
    losses = -p.log()
    if not p.is_meta and bool(lost.any()):
        again = linear(h[lost], weight).to(dtype)
        losses[lost] = F.cross_entropy(again, targets[lost], reduction="none")
    return losses
