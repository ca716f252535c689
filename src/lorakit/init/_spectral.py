"""What the starts from singular vectors have in common."""

import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.start import Start


def matrix(A: Tensor, B: Tensor, site: Start) -> Tensor:
    """Give W (out, in) in the dtype of the factors. Raises UsageError for a rank it has not, and a scale that cannot give it."""
    check(len(A), min(A.shape[1], B.shape[0]), site.scale)
    return site.base.matrix().to(A.dtype)


def check(r: int, most: int, scale: float) -> None:
    """Raise UsageError unless r directions can be had of `most`, and s·B·A can be a positive multiple of B·A."""
    if r > most:
        raise UsageError(
            f"r is {r}, but this init can fill no more than {most} directions of one of the layers",
            fix="lower r, set rank_pattern for this layer, or leave it out with exclude_modules",
        )
    if scale <= 0:
        raise UsageError(f"this init needs a positive scale, not {scale:g}", fix="give a positive alpha")


def fill(A: Tensor, B: Tensor, U: Tensor, S: Tensor, Vh: Tensor, scale: float) -> None:
    """Set s·B·A = U diag(S) Vh, half of S in each factor: B = U sqrt(S/s), A = sqrt(S/s) Vh."""
    root = (S / scale).sqrt()
    A.copy_(root[:, None] * Vh)
    B.copy_(U * root)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give U (out, k), S (k,), Vh (k, in) with k = min(out, in), S descending."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U, S, Vh
