"""LoRA-Pro: the step of the full weight that its two gradients amount to (C8), and Adam on the full gradient."""

import pytest
import torch
from problem import Problem, close
from torch import Tensor

import lorakit as lk
from lorakit.optim import state_bytes
from lorakit.optim.lora_pro import adjusted


def projectors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return A.T @ torch.linalg.inv(A @ A.T) @ A, B @ torch.linalg.inv(B.T @ B) @ B.T


@pytest.mark.parametrize("alpha", [1.5, 6.0, 40.0])
def test_c8_the_factors_together_follow_the_full_gradient(alpha: float) -> None:
    p = Problem(lk.LoRA(r=3, alpha=alpha))
    A, B, s, G = p.A.detach(), p.B.detach(), p.adapter.scale, p.G
    a, b = adjusted(A, B, s * B.T @ G, s * G @ A.T, s)
    P_A, P_B = projectors(A, B)
    wanted = P_B @ G + G @ P_A - P_B @ G @ P_A
    close(s * B @ a + s * b @ A, wanted, 1e-9)
    X = torch.randn(3, 3).double()  # any other choice of X gives the same step
    close(s * B @ (a + X @ A) + s * (b - B @ X) @ A, wanted, 1e-9)


def test_no_step_of_the_factors_is_nearer_to_the_full_gradient_and_none_as_near_is_nearer_to_theirs() -> None:
    p = Problem()
    A, B, s, G = p.A.detach(), p.B.detach(), p.adapter.scale, p.G
    g_A, g_B = s * B.T @ G, s * G @ A.T
    a, b = adjusted(A, B, g_A, g_B, s)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (s * B @ a + s * b @ A - G).norm()

    def length(a: Tensor, b: Tensor) -> Tensor:
        return (a - g_A).square().sum() + (b - g_B).square().sum()

    torch.manual_seed(1)
    for _ in range(20):
        assert distance(a + 0.1 * torch.randn_like(a), b + 0.1 * torch.randn_like(b)) > distance(a, b)
    X = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    length(a + X @ A, b - B @ X).backward()  # convex in X: the least is where the gradient is zero
    close(X.grad, torch.zeros(3, 3).double(), 1e-9)
    assert length(a, b) > 1e-3


def test_at_the_start_b_follows_the_projected_gradient_and_a_stays() -> None:
    p = Problem(zero_b=True)
    A = p.A.detach().clone()
    p.step(p.optimizer("lora_pro", lr=0.1, options={"adam": False}))
    P_A, _ = projectors(A, torch.eye(9, 3).double())
    close(p.change, -0.1 * p.G @ P_A, 1e-9)
    assert torch.equal(p.A, A)


def test_plain_descent_moves_the_weight_by_the_projected_gradient() -> None:
    p, lr = Problem(), 1e-6
    before, (P_A, P_B) = p.change, projectors(p.A.detach(), p.B.detach())
    optimizer = p.optimizer("lora_pro", lr=lr, options={"adam": False})
    p.step(optimizer)
    close((p.change - before) / -lr, P_B @ p.G + (p.G - P_B @ p.G) @ P_A, 1e-4)
    assert state_bytes(optimizer) == 0


def test_adam_is_that_of_the_full_gradient() -> None:
    """Against AdamW on a full weight whose gradients are the equivalent ones, projected back step by step."""
    p, lr = Problem(), 1e-6
    optimizer = p.optimizer("lora_pro", lr=lr, eps=1e-12)
    full = torch.zeros(9, 13, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.AdamW([full], lr=1.0, eps=1e-12, weight_decay=0.0)
    for step in range(4):
        G, s = p.G * (1 - 0.4 * step), p.adapter.scale
        P_A, P_B = projectors(p.A.detach(), p.B.detach())
        full.grad = P_B @ G + (G - P_B @ G) @ P_A
        old, before = full.detach().clone(), p.change
        reference.step()
        U = old - full.detach()
        p.step(optimizer, G)
        close((p.change - before) / -lr, P_B @ U + (U - P_B @ U) @ P_A, 1e-4)
    assert state_bytes(optimizer) == 2 * 9 * 13 * 8
    assert float(s) == 2.0
