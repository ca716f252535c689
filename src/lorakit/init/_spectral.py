"""What the starts from singular vectors have in common."""

import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.start import Start


def matrix(A: Tensor, B: Tensor, site: Start) -> Tensor:
    """Give W (out, in) in the dtype of the factors. Raises UsageError if it has fewer than r singular values."""
    check(len(A), min(A.shape[1], B.shape[0]))
    return site.base.matrix().to(A.dtype)


def check(r: int, most: int) -> None:
    """Raise UsageError unless r directions can be had of `most`."""
    if r > most:
        raise UsageError(
            f"r is {r}, but this init can fill no more than {most} directions of one of the layers",
            fix="lower r, set rank_pattern for this layer, or leave it out with exclude_modules",
        )


def fill(A: Tensor, B: Tensor, U: Tensor, S: Tensor, Vh: Tensor, scale: float) -> None:
    """Set s·B·A = U diag(S) Vh, half of S in each factor: B = U sqrt(S/s), A = sqrt(S/s) Vh."""
    root = (S / scale).sqrt()
    A.copy_(root[:, None] * Vh)
    B.copy_(U * root)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give U (out, k), S (k,), Vh (k, in) with k = min(out, in), S descending."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U, S, Vh
