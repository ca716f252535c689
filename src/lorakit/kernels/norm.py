"""RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467), frozen, as the prologue of a projection.

    h = x / rms(x) * w      rms(x) = sqrt(mean(x^2) + eps)

Nothing but x is kept: h is made again in the backward pass. Statistics are fp32 whatever x is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class RMSNorm:
    """w: (n,), the whole factor: 1 + weight for Gemma. `wide`: multiply by w before rounding to x's dtype, as Gemma does."""

    recomputes = True

    def __init__(self, weight: Tensor, eps: float, *, wide: bool = False) -> None:
        self.weight, self.eps, self.wide = weight, eps, wide

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Give h, and with it y = x / rms in the wide dtype and 1 / rms (..., 1)."""
        x = inputs[0]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # once: operations on two dtypes are slow
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        y = wide * inverse if wide is x else wide.mul_(inverse)
        if self.wide:
            return (y * self.weight).to(x.dtype), (y, inverse)
        h, weight = y.to(x.dtype), self.weight.to(x.dtype)
        return h * weight if h is y else h.mul_(weight), (y, inverse)

    def backward(self, dh: Tensor, way: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Give dx = (g - y mean(g y)) / rms, g = w dh."""
        y, inverse = way
        g = dh.mul_(self.weight.to(dh.dtype)).to(y.dtype)
        along = (g * y).sum(-1, keepdim=True).div_(-y.shape[-1])
        return (g.addcmul_(y, along).mul_(inverse).to(dh.dtype),)


def reference(x: Tensor, weight: Tensor, eps: float, *, wide: bool = False) -> Tensor:
    """Compute the same, differentiable."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype) if wide else weight.to(x.dtype) * y.to(x.dtype)
