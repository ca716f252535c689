"""PiSSA: the adapter starts as the principal part of W. Meng, Wang and Zhang 2024, https://arxiv.org/abs/2404.02948

    W = U S V^T        B = U_r sqrt(S_r / s)      A = sqrt(S_r / s) V_r^T      s·B·A = U_r S_r V_r^T

Departure from the paper: the residual W - s·B·A is not put in W's place. The adapter takes its start off again
(`core/chain.py`), which is the same function and the same gradients, leaves the base untouched, and works on a quantized one.

When: the task needs what W does most, and the first steps are to be large. It costs a singular value decomposition of
each layer at the start and an adapter of rank 2r when it is saved; changes that have nothing to do with the largest
directions of W are harder to reach than from zero.
"""

from torch import Tensor

from ..core.start import Start
from ._spectral import fill, matrix, svd

FROM_BASE = True


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A and B with the r largest singular values of W and their vectors."""
    r = len(A)
    U, S, Vh = svd(matrix(A, B, site))
    fill(A, B, U[:, :r], S[:r], Vh[:r], site.scale)
