"""How fast a loss can bend, and what that promises of convergence: true locally, and never globally in the factors."""

import math

import torch
from torch import Tensor

from . import curvature
from ._precision import wide


def logit_curvature(p: Tensor) -> float:
    """Give the largest eigenvalue of diag(p) - p p^T, the Hessian of cross entropy in the logits: at most 1/2. p (n,)."""
    p = wide(p)
    return float(torch.linalg.eigvalsh(p.diag() - torch.outer(p, p))[-1])


def factor_curvature(A: Tensor, B: Tensor, scale: float, hessian_norm: float, G: Tensor) -> float:
    """Give the bound s^2 (||A||_2^2 + ||B||_2^2) L_W + s ||G||_2 on the largest Hessian eigenvalue in (A, B).

    hessian_norm: L_W = ||H_W||_2 of the loss in W, positive semidefinite there; G = dL/dW (d, k). It grows with the factors,
    so a loss that is smooth in W has no Lipschitz gradient in (A, B).
    """
    a, b, g = (float(torch.linalg.matrix_norm(wide(m), ord=2)) for m in (A, B, G))
    return scale**2 * (a**2 + b**2) * hessian_norm + scale * g


def contraction(sigma: float, scale: float, lr: float) -> float:
    """Give (1 - lr s σ)^2, by which a gradient step shrinks the loss along σ's slow mode at the balanced optimum."""
    return (1 - lr * scale * sigma) ** 2


def spectral_norm(weight: Tensor, steps: int = 60) -> float:
    """Give ||W||_2 by Lanczos on W^T W, without an SVD of W (d, k). From below; W in float32 at least."""
    W = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    start = torch.randn(W.shape[1], generator=torch.Generator().manual_seed(0)).to(W)
    if not bool(W.any()):
        return 0.0
    return math.sqrt(float(curvature.lanczos(lambda v: W.T @ (W @ v), start, steps, tolerance=1e-7).values[-1]))


def product_speed(u: float, start: float, target: float) -> float:
    """Give du/dt = sqrt(a_0^4 + 4 u^2) (m - u), gradient flow on 1/2 (a b - m)^2 for u = a b from a = a_0, b = 0."""
    return math.sqrt(start**4 + 4 * u**2) * (target - u)
