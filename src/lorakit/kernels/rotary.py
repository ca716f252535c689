"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) in the layout that attention wants.

    y = x cos + rotate(x) sin      rotate((x1, x2)) = (-x2, x1), halves of the head's dimension

From a projection's output (B, T, heads, D) to (B, heads, T, D) in one pass; only cos and sin are kept. The gradient is the
rotation back: dx = dy cos - rotate(dy sin).
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Give y (B, heads, T, D) for x (B, T, heads, D), cos and sin (B, T, D) in the dtype of x."""
    return cast(Tensor, _Rotate.apply(x, cos, sin))


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute the same, differentiable."""
    x, cos, sin = x.transpose(1, 2), cos[:, None], sin[:, None]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = x.transpose(1, 2).chunk(2, -1)
        (c1, c2), (s1, s2) = cos[:, None].chunk(2, -1), sin[:, None].chunk(2, -1)
        y = x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3])
        y1, y2 = y.chunk(2, -1)
        torch.mul(first, c1, out=y1).addcmul_(second, s1, value=-1)
        torch.mul(second, c2, out=y2).addcmul_(first, s2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        first, second = dy.transpose(1, 2).chunk(2, -1)
        (c1, c2), (s1, s2) = cos[:, :, None].chunk(2, -1), sin[:, :, None].chunk(2, -1)
        dx = dy.new_empty(dy.shape[0], dy.shape[2], dy.shape[1], dy.shape[3])
        d1, d2 = dx.chunk(2, -1)
        torch.mul(first, c1, out=d1).addcmul_(second, s2)
        torch.mul(second, c2, out=d2).addcmul_(first, s1, value=-1)
        return dx, None, None
