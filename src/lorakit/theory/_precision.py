"""Every formula computes in double precision, whatever the tensors are stored in."""

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """Give the tensor detached and in float64; in float32 on devices that have no float64 (Apple's MPS)."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def inner(a: Tensor, b: Tensor) -> float:
    """Give the Frobenius product <a, b> = tr(a^T b) of two tensors of one shape."""
    return float((wide(a) * wide(b)).sum())
