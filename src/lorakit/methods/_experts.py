"""Several low-rank experts on one layer, weighed for each token: what the mixtures share."""

from torch import Tensor

from ..core.adapter import Base


def channel_dim(base: Base, v: Tensor) -> int:
    """Give the dimension, counted from the end, in which this layer's output has its channels."""
    return -base.channels(v).dim()


def mix_experts(x: Tensor, base: Base, A: Tensor, B: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Give sum_i p_i B_i A_i x for A (n, r, in), B (n, out, r) and weights p that have n channels in dimension `dim`.

    Two products of rank n·r for all experts together: at their size that is cheaper than to gather the tokens of each.
    """
    n, r, width = A.shape
    h = base.project(x, A.reshape(n * r, width))
    h = h * weights.to(h.dtype).repeat_interleave(r, dim=dim)
    return base.mix(h, B.movedim(0, 1).reshape(-1, n * r))
