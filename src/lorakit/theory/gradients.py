"""What the gradients of the factors say about ΔW = s·B·A, without the gradient G = dL/dW (d, k) ever being made.

    dB = dL/dB = s G A^T (d, r)          dA = dL/dA = s B^T G (r, k)
    <A, dA> = <B, dB> = <ΔW, G> = dL/dγ at γ = 1, where ΔW is replaced by γ ΔW

The identity holds for every loss, batch and dropout mask, as long as both gradients are of one and the same pass.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import spectrum
from ._precision import inner, wide


class ScaleDerivative(NamedTuple):
    """dL/dγ of a change γ ΔW at γ = 1, and how far the two ways to it differ, relative to ||A|| ||dA||."""

    value: float
    mismatch: float


def factor_gradients(G: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Give (dA, dB) for G = dL/dW (d, k), A (r, k), B (d, r)."""
    G = wide(G)
    return scale * (wide(B).T @ G), scale * (G @ wide(A).T)


def scale_derivative(A: Tensor, dA: Tensor, B: Tensor, dB: Tensor) -> ScaleDerivative:
    """Give <A, dA>, and |<A, dA> - <B, dB>| over the larger of ||A|| ||dA|| and ||B|| ||dB||.

    Held out: positive means the adapter is too strong, negative that it is too weak or not done. The mismatch checks the
    backward pass: fused kernels and checkpointing must leave it at rounding.
    """
    by_A, by_B = inner(A, dA), inner(B, dB)
    size = max(float(wide(P).norm() * wide(dP).norm()) for P, dP in ((A, dA), (B, dB)))
    return ScaleDerivative(by_A, abs(by_A - by_B) / size if size else 0.0)


def component_sensitivities(A: Tensor, B: Tensor, dB: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Give σ (q,) and u_i^T G v_i (q,) of each singular triplet of s·B·A: dL/dσ_i; sum σ_i u_i^T G v_i = dL/dγ.

    u_i^T G v_i = u_i^T dB c_i / s with A^T c_i = v_i, solvable because v_i lies in A's row space; for singular values at
    rounding the row space is not known and the entry means nothing.
    """
    found = spectrum.svd(A, B, scale)
    c = torch.linalg.lstsq(wide(A).T, found.V, driver=None if A.is_cuda else "gelsd").solution
    return found.S, (found.U.T @ wide(dB) * c.T).sum(1) / scale


# --- the first step ---------------------------------------------------------------------------------------------------


def adam_first_update(d: int, r: int, scale: float, lr: float) -> float:
    """Give ||ΔW||_F after the first Adam step from B = 0 and A Kaiming-uniform (a = sqrt5): s lr sqrt(d r / 3).

    With s = alpha/r that is alpha lr sqrt(d / (3 r)), with rsLoRA alpha lr sqrt(d / 3), free of the rank. Adam's first step
    is lr times the sign, so B = -lr sign(dB), and ||A_0||_F^2 = r/3; taking the signs as independent of A is the estimate.
    """
    return scale * lr * math.sqrt(d * r / 3)


def initial_norms(k: int, r: int, scale: float) -> tuple[float, float]:
    """Give E||A_0||_F^2 = r/3 and E||dB||_F^2 / ||G||_F^2 = s^2 r/(3k) for A_0 uniform in (-1/sqrt k, 1/sqrt k)."""
    return r / 3, scale**2 * r / (3 * k)


def sgd_effective_rate(k: int, r: int, scale: float, lr: float) -> float:
    """Give the rate at which SGD on B alone moves W along its gradient, in expectation over A_0: lr s^2 r / (3k)."""
    return lr * scale**2 * r / (3 * k)


# --- how much of a gradient the factors can follow ----------------------------------------------------------------------


def capture(G: Tensor, A: Tensor) -> float:
    """Give ||G P_A||_F^2 / ||G||_F^2, P_A the projection on A's rows: what B can follow. Random A: r/k. FLORA 2402.03293."""
    Q, _ = torch.linalg.qr(wide(A).T)
    return float((wide(G) @ Q).square().sum() / wide(G).square().sum())


def tangent_capture(G: Tensor, A: Tensor, B: Tensor) -> float:
    """Give the share of G that B and A can follow together: (||P_B G||^2 + ||G P_A||^2 - ||P_B G P_A||^2) / ||G||^2."""
    G = wide(G)
    Q_A, _ = torch.linalg.qr(wide(A).T)
    Q_B, _ = torch.linalg.qr(wide(B))
    left, right = (Q_B.T @ G).square().sum(), (G @ Q_A).square().sum()
    return float((left + right - (Q_B.T @ G @ Q_A).square().sum()) / G.square().sum())


def movement(A: Tensor, A0: Tensor) -> float:
    """Give ||A - A_0||_F / ||A_0||_F. Near 0 the run is a random projection (A could be frozen); NaN for A_0 = 0."""
    start = float(wide(A0).norm())
    return float((wide(A) - wide(A0)).norm()) / start if start else math.nan


# --- coupling -----------------------------------------------------------------------------------------------------------


class Coupling(NamedTuple):
    """Second moments of the factors' gradients over g and x, and ||AB|| / sqrt(||AA|| ||BB||), 0 where B = 0."""

    AA: Tensor
    """E[dA_ia dA_jb], (r, k, r, k)."""
    BB: Tensor
    """E[dB_bi dB_cj], (d, r, d, r)."""
    AB: Tensor
    """E[dA_ia dB_bj], (r, k, d, r)."""
    strength: float


def coupling(A: Tensor, B: Tensor, scale: float, Gamma: Tensor, Sigma: Tensor) -> Coupling:
    """Give the three blocks for Γ = E g g^T (d, d) and Σ = E x x^T (k, k), for one token and g independent of x.

    E[dA dA] = s^2 (B^T Γ B) x Σ, E[dB dB] = s^2 Γ x (A Σ A^T), E[dA_ia dB_bj] = s^2 (B^T Γ)_ib (Σ A^T)_aj. In transformers g
    depends on x: a picture, not a measurement.
    """
    A, B, Gamma, Sigma = (wide(t) for t in (A, B, Gamma, Sigma))
    square = scale**2
    AA = square * torch.einsum("ij,ab->iajb", B.T @ Gamma @ B, Sigma)
    BB = square * torch.einsum("bc,ij->bicj", Gamma, A @ Sigma @ A.T)
    AB = square * torch.einsum("ib,aj->iabj", B.T @ Gamma, Sigma @ A.T)
    sizes = float(AA.norm() * BB.norm())
    return Coupling(AA, BB, AB, float(AB.norm()) / math.sqrt(sizes) if sizes else 0.0)
