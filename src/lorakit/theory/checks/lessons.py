"""What is only taught: T50 to T54. No number of a report rests on it, `lorakit explain` does."""

import math

import torch

from .. import curvature, flops, gauge, noise, smoothness, tails
from .. import spectrum as sp
from .outcome import Outcome, Where


def rank(where: Where) -> Outcome:
    """T50: 3x + 4y = 18 and 6x + 8y = 36 have rank 1; a 5 x 4 product of rank 2 in 18 numbers for 20; 1/256 of a layer."""
    eye = where.tensor([[1.0, 0.0], [0.0, 1.0]])
    singular = sp.singular_values(eye, where.tensor([[3.0, 4.0], [6.0, 8.0]]))
    B = where.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8], [0.9, 1.0]])
    A = where.tensor([[1.1, 1.2, 1.3, 1.4], [1.5, 1.6, 1.7, 1.8]])
    dense = torch.linalg.svdvals(B @ A)
    eps = torch.finfo(where.dtype).eps
    measured = (
        float(sp.numerical_rank(singular, 2, 2, eps)),
        float(sp.numerical_rank(dense, 5, 4, 10 * eps)),
        float(B.numel() + A.numel()),
        flops.compression(4096, 4096, 8),
    )
    return Outcome((1.0, 2.0, float(flops.parameters(5, 4, 2)), 256.0), measured)


def smooth(where: Where) -> Outcome:
    """T51: cross entropy bends by at most 1/2; Weyl; the local bound in (A, B) holds; ||W||_2 by Lanczos."""
    halves = smoothness.logit_curvature(where.tensor([0.5, 0.5, 0.0, 0.0, 0.0]))
    others = [smoothness.logit_curvature(where.randn(5, seed=i).double().softmax(0)) for i in range(20)]
    W, D = where.randn(9, 7, seed=1).double(), where.randn(9, 7, seed=2).double()
    shift = torch.linalg.svdvals(W + D) - torch.linalg.svdvals(W)
    A, B, scale = where.randn(2, 4, seed=3).double(), where.randn(5, 2, seed=4).double(), 1.5
    # 1/2 ||s B A - M||^2: H_W = 1 and G = s B A - M.
    bound = smoothness.factor_curvature(A, B, scale, 1.0, scale * B @ A - 1.0)
    split = A.numel()
    flat = torch.cat([A.flatten(), B.flatten()])

    def loss(both: torch.Tensor) -> torch.Tensor:
        return (scale * both[split:].view_as(B) @ both[:split].view_as(A) - 1.0).square().sum() / 2

    true = torch.autograd.functional.hessian(loss, flat)
    tightness = float(torch.linalg.eigvalsh(true)[-1]) / bound
    measured = (
        halves,
        float(max(others) <= 0.5),
        float(float(shift.abs().max()) <= float(torch.linalg.matrix_norm(D, ord=2))),
        float(0.3 < tightness <= 1),
        smoothness.spectral_norm(W) / float(torch.linalg.matrix_norm(W, ord=2)),
    )
    return Outcome((0.5, 1.0, 1.0, 1.0, 1.0), measured, tolerance=1e-9)


def slow_mode(where: Where) -> Outcome:
    """T52: near the optimum of diag(3, 1) in (5, 4) a step of rate 0.1 leaves .81 of the loss of the slow mode; scalar flow."""
    M, lr = torch.zeros(5, 4, dtype=torch.float64), 0.1
    M[0, 0], M[1, 1] = 3.0, 1.0
    A, B = gauge.rebalance(torch.eye(4, dtype=torch.float64), M)
    A, B = A[:2], B[:, :2].clone()
    B[4] = torch.tensor([0.0, 1e-5])  # a row that M leaves empty, along σ = 1
    losses = []
    for _ in range(2):
        R = B @ A - M
        losses.append(float(R.square().sum()))
        A, B = A - lr * B.T @ R, B - lr * R @ A.T
    nonzero = curvature.bilinear_spectrum([3.0, 1.0, 0.0, 0.0], [0, 1], 5, 4, 2)
    slowest = float(nonzero[nonzero > 1e-9].min())
    measured = (losses[1] / losses[0], slowest, smoothness.contraction(slowest, 1.0, lr), _flows_apart(0.3, 3.0))
    return Outcome((0.81, 1.0, 0.81, 0.0), measured, tolerance=1e-6)


def _flows_apart(start: float, target: float) -> float:
    """Follow (a, b) and u = a b by Runge and Kutta's rule, and give how far a b and u are apart at the end."""
    state, dt = torch.tensor([start, 0.0, 0.0], dtype=torch.float64), 2e-3

    def speed(s: torch.Tensor) -> torch.Tensor:
        a, b, u = s.tolist()
        error = target - a * b
        return torch.tensor([b * error, a * error, smoothness.product_speed(u, start, target)], dtype=torch.float64)

    for _ in range(1000):
        k1 = speed(state)
        k2 = speed(state + dt / 2 * k1)
        k3 = speed(state + dt / 2 * k2)
        state = state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + speed(state + dt * k3))
    return float(state[0] * state[1] - state[2])


def optimal_rank(where: Where) -> Outcome:
    """T53: σ_i = 1/i with noise 10^-4 a rank is best at r* = 100; of (5, 3, 1.6, 1.6, 1.6) two are worth keeping, not five."""
    sigma = 1 / torch.arange(1, 20001, dtype=torch.float64)
    tails_ = sigma.square().flip(0).cumsum(0).flip(0)
    risks = tails_[[98, 99, 100, 101]] + 1e-4 * torch.tensor([98.0, 99.0, 100.0, 101.0], dtype=torch.float64)
    ys = (5.0, 3.0, 1.6, 1.6, 1.6)
    costs = [sum(map(noise.keep_cost, ys[:q])) + sum(y**2 for y in ys[q:]) for q in range(6)]
    usual = [2 * q + sum(y**2 for y in ys[q:]) for q in range(6)]
    measured = (
        noise.power_law_rank(1, 1, 1e-4),
        float(risks[2] - risks[1]),
        float(risks[3] > risks[2]),
        float(costs.index(min(costs))),
        float(usual.index(min(usual))),
    )
    return Outcome((100.0, 0.0, 1.0, 2.0, 5.0), measured, tolerance=1e-9)


def heavy_tail(where: Where) -> Outcome:
    """T54: of 10,000 values with α = 3 the estimate is 3, its error (α - 1)/sqrt n; of 16 it scatters by more than half."""
    many = tails.exponent((1 - where.rand(10_000, seed=1).double()) ** -0.5, 1.0)
    few = [tails.exponent((1 - where.rand(16, seed=10 + i).double()) ** -0.5, 1.0).alpha for i in range(400)]
    spread = float(torch.tensor(few).std())
    measured = (many.alpha, many.se / (2 / math.sqrt(10_000)), float(0.5 < spread < 0.7))
    return Outcome((3.0, 1.0, 1.0), measured, tolerance=0.06)
