"""OLoRA: the adapter starts from the QR factors of W, B with orthonormal columns. Büyükakyüz 2024, https://arxiv.org/abs/2406.01775

    W = Q R        B = Q[:, :r]      A = R[:r]

s·B·A is s times the part of W in the span of its first r columns. Departure from the paper: the base is not touched
(`core/chain.py`).

When: PiSSA's idea is wanted for a QR decomposition's price. Which directions it takes depends on the order of the
inputs; the adapter is saved with rank 2r.
"""

import torch
from torch import Tensor

from ..core.start import Start
from ._spectral import matrix

FROM_BASE = True


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill B with the first r columns of Q, A with the first r rows of R."""
    r = len(A)
    Q, R = torch.linalg.qr(matrix(A, B, site))
    A.copy_(R[:r])
    B.copy_(Q[:, :r])
