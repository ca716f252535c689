"""How much of the gradient's reproducible part rank q can follow: cross-validation over two halves of the data.

The singular values of a measured gradient are signal plus noise, and noise has energy in every direction: "the rank with 90 %
of the energy" measures the noise. Directions found on one half and scored on the other are free of that:

    c(q) = sum_{i<=q} s_i u_i^T G2 v_i / <G1, G2>,  G1 = U diag(s) V^T, and the same with the halves exchanged

<G1, G2> is an unbiased estimate of ||mean gradient||^2, the numerator of <G1_q, mean gradient>. LoRA-GA 2407.05000 and EVA
2410.07170 use the directions; the scoring on another half is what makes a rank of them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import inner, wide


class Half(NamedTuple):
    """Directions found on one half and what the other half says of them: s (q,), cross (q,) = u_i^T G_other v_i."""

    s: Tensor
    cross: Tensor


class Curve(NamedTuple):
    """captured (q,): c(1..q). signal: <G1, G2>; not positive means that this many samples show no reproducible gradient."""

    captured: Tensor
    signal: float

    def smallest_rank(self, share: float = 0.9) -> int | None:
        """Give the least q with c(q) >= share; None if no rank of the curve reaches it or there is no signal."""
        reached = torch.nonzero(self.captured >= share)
        return int(reached[0]) + 1 if self.signal > 0 and len(reached) else None


def half(G: Tensor, other: Tensor, top: int) -> Half:
    """Give the first `top` directions of G (d, k), and what the gradient of the other half says of them."""
    U, s, vh = torch.linalg.svd(wide(G), full_matrices=False)
    U, s, vh = U[:, :top], s[:top], vh[:top]
    return Half(s, (U.T @ wide(other) * vh).sum(1))


def cross_validated(G1: Tensor, G2: Tensor, top: int) -> Curve:
    """Give c(q) for q up to `top` from the mean gradients of two halves, both ways averaged."""
    return curve([half(G1, G2, top), half(G2, G1, top)], inner(G1, G2))


def curve(halves: Sequence[Half], signal: float) -> Curve:
    """Give c(q) from what hooks collect (no gradient is stored): directions of each half scored by the other."""
    sums = torch.stack([(h.s * h.cross).cumsum(0) for h in halves]).mean(0)
    return Curve(sums / signal if signal > 0 else torch.full_like(sums, math.nan), signal)


def bootstrap(
    s: Tensor, cross: Tensor, signal: Tensor, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Give the band (low, high), each (q,), of c(q) over resamples of the sequences of the scoring half.

    s (q,); cross (n, q): u_i^T g_t v_i of each sequence t; signal (n,): <G1, g_t>. The unit is the sequence, not the token.
    Draws where the signal is not positive count as nothing captured.
    """
    n = len(signal)
    rows = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed)).to(signal.device)
    numerator = (wide(s) * wide(cross)[rows].mean(1)).cumsum(1)
    denominator = wide(signal)[rows].mean(1, keepdim=True)
    captured = torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))
    tail = (1 - level) / 2
    return captured.quantile(tail, dim=0), captured.quantile(1 - tail, dim=0)


def energy_rank(G: Tensor, share: float = 0.9) -> int:
    """Give the rank with that share of the energy of one measured gradient: too high where there is noise. For comparison."""
    S = torch.linalg.svdvals(wide(G))
    p = S.square().cumsum(0) / S.square().sum()
    return int((p < share).sum()) + 1
