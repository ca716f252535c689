"""Block-diagonal rotations: the map from trained numbers to orthogonal blocks, and how a layer is run with them.

Blocks R (n, b, b) rotate a vector (n b,) block by block: x -> x·blockdiag(R).
"""

import torch
from torch import Tensor

from ..core.adapter import Base


def cayley(Q: Tensor) -> Tensor:
    """Give (I - Q)(I + Q)^-1 for skew-symmetric Q (..., b, b): orthogonal, determinant 1, and I exactly where Q is 0."""
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    return torch.linalg.solve(one + Q, one - Q, left=False)


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """Give x blockdiag(R) for x (..., n b) and R (n, b, b), or one block (1, b, b) for all."""
    size = blocks.shape[-1]
    blocks = blocks.expand(x.shape[-1] // size, size, size)
    return torch.einsum("...nk,nkc->...nc", x.unflatten(-1, (-1, size)), blocks).flatten(-2)


def on_patches(x: Tensor, base: Base, weight: Tensor, merged: Tensor) -> Tensor:
    """Run a layer whose input has no vectors that could be rotated (a convolution): add the change of its matrix."""
    return base.frozen(x) + base.project(x, (merged - weight).to(x.dtype))
