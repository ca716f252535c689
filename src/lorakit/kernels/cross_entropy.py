"""The cross entropy of a frozen head, without ever holding the logits.

    loss_i = logsumexp(W h_i) - (W h_i)[y_i]        h: (n, d)   W: (vocabulary, d)   dh = (softmax(W h) - onehot(y)) W

Chunks of rows go through one pair of buffers; the gradient of h is computed on the way, while the probabilities are there,
and scaled when the backward pass comes. So 49,152 logits a token, three or four times over in fp32 in an ordinary loop, are
never stored.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gemm import linear, linear_back

ROWS = 128  # of a chunk: enough for the matrix product's full speed, and the buffers stay small
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
        shape = (min(ROWS, len(h)), len(weight))
        buffer = h.new_empty(shape, dtype=wide)
        narrow = h.new_empty(shape) if wide != h.dtype and dh is not None else None
        for start in range(0, len(h), ROWS):
            rows, y = h[start : start + ROWS], targets[start : start + ROWS]
            logits = linear(rows, weight)
            p = buffer[: len(rows)].copy_(logits) if wide != h.dtype else logits
            torch.ops.aten._softmax.out(p, -1, False, out=p)
            own = p.gather(1, y[:, None])[:, 0]
            losses[start : start + ROWS] = _surprise(own, rows, weight, y, wide)
            if dh is not None:
                q = p if narrow is None else narrow[: len(rows)].copy_(p)
                dh[start : start + ROWS] = linear_back(q, weight).sub_(weight[y])
        ctx.save_for_backward(*([] if dh is None else [dh]))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (dh,) = ctx.saved_tensors
        return dh * grad.to(dh.dtype)[:, None], None, None


def _surprise(p: Tensor, h: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Give -log p of each row, of rows whose probability is lost in fp32 from their logits."""
    lost = p < _LEAST
    losses = -p.log()
    if not p.is_meta and bool(lost.any()):
        again = linear(h[lost], weight).to(dtype)
        losses[lost] = F.cross_entropy(again, targets[lost], reduction="none")
    return losses
