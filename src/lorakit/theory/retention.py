"""How far a model has moved as a distribution: what forgetting goes with, unlike the norm of ΔW. Shenfeld et al. 2509.04259."""

import torch
from torch import Tensor

AT_ONCE = 1 << 24  # logits in float64 at once: 128 MB


def kl(base: Tensor, adapted: Tensor) -> Tensor:
    """Give KL(base || adapted) in nats of each row of logits (n, vocabulary): (n,), float64, exactly 0 for equal logits.

    Rows are taken in slices, for float64 logits of a whole batch are large.
    """
    rows = max(1, AT_ONCE // base.shape[-1])
    return torch.cat([_kl(p, q) for p, q in zip(base.split(rows), adapted.split(rows), strict=True)])


def _kl(base: Tensor, adapted: Tensor) -> Tensor:
    dtype = torch.float32 if base.device.type == "mps" else torch.float64
    p, q = (t.detach().to(dtype).log_softmax(-1) for t in (base, adapted))
    return (p.exp() * (p - q)).sum(-1)
