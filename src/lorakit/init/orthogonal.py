"""A with orthonormal rows, B zero: every direction of the r-dimensional input space starts with the same gain.

Saxe et al. 2013, https://arxiv.org/abs/1312.6120

When: all r directions of A are to start with the same weight, which matters most where A is frozen or barely moves.
It costs a QR decomposition of (in, r) a layer.
"""

from torch import Tensor, nn

from ..core.start import Start


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A so that A A^T = I (columns orthonormal instead if r > in), B with zero."""
    nn.init.orthogonal_(A)
    B.zero_()
