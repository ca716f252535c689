"""LoftQ: the adapter of a quantized base starts as the best repair of what quantization lost. Li et al. 2023, https://arxiv.org/abs/2310.08659

    Q_t = quant(W - s·B·A)        s·B·A = the r largest singular terms of W - dense(Q_t)        t = 1, 2, ..., T

The last Q is the base, so this needs W from before it was quantized: `models/quantize.py` runs the alternation and keeps the
residual W - dense(Q), `start` takes its leading part. With T = 1 the base is the ordinary quantized model, and the
adapter fits every copy of it; with T > 1 it is another one, to be kept with the adapter.

Departures: s is accounted for (the paper has s = 1), and since rounding to absmax blocks is no projection, an iteration that
did not lessen |W - dense(Q) - s·B·A| is dropped.

When: the base is stored in 4 bits and the rank is small, for the start repairs what r directions can of what rounding
took. It costs a singular value decomposition of each layer; the adapter then belongs to this very base.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.start import Start
from ..core.weight import dense
from ._spectral import check, fill, svd

NEEDS = frozenset({"residual"})


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A and B so that s·B·A is the best rank-r approximation of what the stored weight lost."""
    r = len(A)
    check(r, min(A.shape[1], B.shape[0]))
    U, S, Vh = svd(site.measured("residual").to(A.dtype))
    fill(A, B, U[:, :r], S[:r], Vh[:r], site.scale)


@torch.no_grad()
def alternate(W: Tensor, quantized: Callable[[Tensor], Tensor], r: int, iterations: int) -> Tensor:
    """Give the stored weight Q for which W is closest to dense(Q) plus a matrix of rank r, of `iterations` (at least 1) tries.

    quantized: makes a stored weight of a matrix like W, in any format that `core/weight.py` reads.
    """
    best, least, low = W, math.inf, torch.zeros_like(W)
    for _ in range(iterations):
        stored = quantized(W - low)
        U, S, Vh = svd(W - dense(stored).to(W.dtype))
        error = float(S[r:].square().sum())
        if error >= least:
            break
        best, least, low = stored, error, (U[:, :r] * S[:r]) @ Vh[:r]
    return best
