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

    def inverse(self, x: Tensor) -> Tensor:
        """Give 1 / rms(x), (..., 1) in fp32 (fp64 for fp64)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        return norm.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Give h, and with it x and 1 / rms."""
        x, inverse = inputs[0], self.inverse(inputs[0])
        y = x * inverse  # fp32 where x is bf16
        h = y.mul_(self.weight).to(x.dtype) if self.wide else y.to(x.dtype).mul_(self.weight.to(x.dtype))
        return h, (x, inverse)

    def backward(self, dh: Tensor, way: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Give dx = (w dh - y mean(w dh y)) / rms, y = x / rms."""
        x, inverse = way
        g = (dh * self.weight.to(dh.dtype)).to(inverse.dtype)
        wide = x.to(inverse.dtype)
        along = (g * wide).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return (g.mul_(inverse).addcmul_(wide, along).to(x.dtype),)


def reference(x: Tensor, weight: Tensor, eps: float, *, wide: bool = False) -> Tensor:
    """Compute the same, differentiable."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype) if wide else weight.to(x.dtype) * y.to(x.dtype)
