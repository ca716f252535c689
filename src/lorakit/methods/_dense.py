"""Methods whose change is as large as W: it is made anew in the backward pass instead of being kept until then."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.low_rank import applies


def recomputed(change: Callable[..., Tensor], x: Tensor, *factors: Tensor) -> Tensor:
    """Give `change(x, *factors)`, which draws no random numbers. In training only x and the factors are kept.

    Otherwise every adapted layer would hold a matrix of the size of its W from its forward to its backward pass: for all
    layers together as much memory as the model. torch.compile decides by itself what it makes again.
    """
    if applies(x):
        return checkpoint(change, x, *factors, use_reentrant=False, preserve_rng_state=False)
    return change(x, *factors)
