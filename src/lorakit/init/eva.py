"""EVA: A starts as the directions in which the layer's inputs vary most, B zero. Paischer et al. 2024, https://arxiv.org/abs/2410.07170

    C = E[x x^T] - E[x] E[x]^T = V diag(l) V^T        A = V_r^T        B = 0

and the rank goes where it explains most: `ranks` gives the components with the largest l_i / sum(l) of all layers, at most
rho·r in one, within the budget of r per layer.

Departure from the paper: the covariance of the inputs is accumulated and decomposed once, where the paper updates a truncated
SVD batch by batch until it settles. That costs (in, in) per layer while it is measured, and has no error to settle.

When: the layers differ in how much of their input matters, so that one rank for all wastes some. It costs a pass over
some batches and a matrix (in, in) a layer while they are measured; what is saved is as large as LoRA's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.start import Start
from ..core.statistics import Statistics
from ._spectral import check

NEEDS = frozenset({"inputs"})
RHO = 2.0
"""The largest rank of a layer is this times r: the paper's default. 1 gives every layer the same."""


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A with the r leading eigenvectors of the inputs' covariance, B with zero."""
    check(*A.shape)
    covariance = site.measured("inputs") - torch.outer(mean := site.measured("mean"), mean)
    _, vectors = torch.linalg.eigh(covariance)
    A.copy_(vectors[:, -len(A) :].T.flip(0))
    B.zero_()


def ranks(statistics: Mapping[str, Statistics], r: int | Mapping[str, int], rho: float = RHO) -> dict[str, int]:
    """Distribute the ranks of all layers by explained variance: a `rank_pattern` of the same sum, at most rho·r in a layer.

    r: the rank of every layer, or of each by path. A layer may get 0: it should not be adapted then.
    """
    if rho < 1:
        raise UsageError(f"rho must be at least 1, not {rho:g}", why="the ranks could not add up to the budget")
    own = {path: r if isinstance(r, int) else r[path] for path in statistics}
    shares = []
    for path, known in statistics.items():
        shares += [(share, path) for share in explained(known)[: round(rho * own[path])]]
    best = sorted(shares, key=lambda entry: -entry[0])[: sum(own.values())]  # stable: ties go to the earlier layer
    chosen = dict.fromkeys(own, 0)
    for _, path in best:
        chosen[path] += 1
    return chosen


def explained(known: Statistics) -> list[float]:
    """Give the share of each principal component in the variance of the inputs, largest first."""
    if known.inputs is None or known.mean is None:
        raise UsageError("EVA needs the second moments of the inputs", fix="calibrate(model, LoRA(init='eva'), ...)")
    covariance = known.inputs - torch.outer(known.mean, known.mean)
    values = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    return (values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)).tolist()
