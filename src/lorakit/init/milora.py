"""MiLoRA: the adapter starts as the minor part of W and leaves what W knows alone. Wang et al. 2024, https://arxiv.org/abs/2406.09044

    W = U S V^T        B = U sqrt(S / s)      A = sqrt(S / s) V^T        for the r smallest singular values

PiSSA from the other end of the spectrum; as there, the base is not touched (`core/chain.py`).

When: what the model knows is to be disturbed little, for training starts in the directions that W uses least. It
costs a singular value decomposition of each layer and an adapter of rank 2r when it is saved.
"""

from torch import Tensor

from ..core.start import Start
from ._spectral import fill, matrix, svd

FROM_BASE = True


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A and B with the r smallest singular values of W and their vectors."""
    r = len(A)
    U, S, Vh = svd(matrix(A, B, site))
    fill(A, B, U[:, -r:], S[-r:], Vh[-r:], site.scale)
