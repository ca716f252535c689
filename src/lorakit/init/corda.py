"""CorDA: W is decomposed as seen by the task's inputs. Yang et al. 2024, https://arxiv.org/abs/2406.05223

    C = E[x x^T]      W C = U S V^T      B = U_r sqrt(S_r / s)      A = sqrt(S_r / s) V_r^T C^-1

Of the exact W = U S V^T C^-1 this takes the r largest terms, measured on the data to be learned: the paper's
"instruction-previewed" mode. `corda_kpm` is the other one. C is damped by 1 % of its mean diagonal, doubled until its inverse
is accurate, as in the authors' code.

Departures: the base is not touched (`core/chain.py`), and C is divided by its mean diagonal. That changes neither B·A nor
the order of the terms, but makes the balance between A and B independent of the size of x.

When: the task's data say which directions of W it uses, and training is to start there. It costs a pass over some
batches, a matrix (in, in) a layer while they are measured, a decomposition of each layer, and an adapter of rank 2r
when it is saved.
"""

import torch
from torch import Tensor

from ..core.start import Start
from ._spectral import fill, matrix, svd

FROM_BASE = True
NEEDS = frozenset({"inputs"})
DAMPING = 0.01
ACCURACY = 0.05
"""Largest Frobenius norm of C C^-1 - 1."""


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A and B with the r largest context-oriented components of W."""
    r = len(A)
    U, S, right = components(A, B, site)
    fill(A, B, U[:, :r], S[:r], right[:r], site.scale)


def components(A: Tensor, B: Tensor, site: Start) -> tuple[Tensor, Tensor, Tensor]:
    """Give U (out, k), S (k,) and V^T C^-1 (k, in) with W = U diag(S) V^T C^-1."""
    W, C = matrix(A, B, site), site.measured("inputs").to(A.dtype)
    C = C / C.diagonal().mean().clamp(min=torch.finfo(C.dtype).tiny)
    one = torch.eye(len(C), dtype=C.dtype, device=C.device)
    damping = DAMPING
    while True:
        damped = C + damping * one
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, one) < ACCURACY:
            break
        damping *= 2
    U, S, Vh = svd(W @ damped)
    return U, S, Vh @ inverse
