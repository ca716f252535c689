"""LoRA-GA: the first step moves W as full fine-tuning would, as far as rank 2r can. Wang, Yu and Li 2024, https://arxiv.org/abs/2407.05000

    G = dL/dW = U S V^T        A = c V[:, :r]^T        B = c U[:, r:2r]        c = out^(1/4) / sqrt(gamma)

One step of gradient descent changes W by -lr s^2 (G A^T A + B B^T G) up to second order, which is -lr s^2 c^2 times the best
rank-2r approximation of G. c is the paper's "stable" scale, with the gamma of the authors' code.

Departure from the paper: the base is not touched (`core/chain.py`). PEFT's start of this name multiplies B by the singular
values of G besides, and A not by c; then the step is no longer the best one.

When: the run is short, so that the first steps count: they go where full fine-tuning would. It costs a forward and a
backward pass over some batches, a matrix (out, in) a layer while they are measured, and an adapter of rank 2r when it
is saved.
"""

import torch
from torch import Tensor

from ..core.start import Start
from ._spectral import check, svd

FROM_BASE = True
NEEDS = frozenset({"gradient"})
GAMMA = 16.0


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A with the first r right singular vectors of the gradient, B with the next r left ones, both times c."""
    r = len(A)
    check(r, min(A.shape[1], B.shape[0]) // 2)
    U, Vh = leading(site.measured("gradient").to(A.dtype), 2 * r)
    c = B.shape[0] ** 0.25 / GAMMA**0.5
    A.copy_(c * Vh[:r])
    B.copy_(c * U[:, r : 2 * r])


def leading(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give the first k singular vectors, U (out, k) and V^T (k, in): from a sketch of twice as many columns, as the authors do."""
    if 2 * k >= min(G.shape):
        U, _, Vh = svd(G)
        return U[:, :k], Vh[:k]
    U, _, V = torch.svd_lowrank(G, q=2 * k, niter=4)
    return U[:, :k], V[:, :k].T
