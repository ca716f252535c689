"""Gradients, balance, curvature, steps: T4 to T17."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import curvature, flops, gain, gauge, gradients
from .outcome import Outcome, Where, largest


class Layer:
    """A linear layer with factors under a cross entropy: the loss, and its gradients by autograd."""

    def __init__(self, where: Where, d: int = 9, k: int = 7, r: int = 3, n: int = 11, scale: float = 2.0) -> None:
        self.scale = scale
        self.W, self.x = where.randn(d, k, seed=20), where.randn(n, k, seed=21)
        self.A, self.B = where.randn(r, k, seed=22), where.randn(d, r, seed=23)
        self.labels = torch.arange(n, device=where.device) % d

    def loss_of(self, weight: Tensor) -> Tensor:
        """Give the summed cross entropy of the outputs of a weight."""
        return F.cross_entropy(self.x @ weight.T, self.labels, reduction="sum")

    def loss(self, A: Tensor, B: Tensor) -> Tensor:
        """Give it with factors."""
        return self.loss_of(self.W + self.scale * (B @ A))

    def by_autograd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give dL/dA, dL/dB and G = dL/dW."""
        A, B = self.A.clone().requires_grad_(), self.B.clone().requires_grad_()
        dA, dB = torch.autograd.grad(self.loss(A, B), (A, B))
        W = (self.W + self.scale * (self.B @ self.A)).requires_grad_()
        (G,) = torch.autograd.grad(self.loss_of(W), W)
        return dA, dB, G


def products(node: Any) -> int:
    """Count the operations of the matrix products of an autograd graph: each one forward, and one for each gradient it owes.

    torch's FlopCounterMode gives the same counts (a test compares) and loads the compiler first, which takes seconds.
    """
    if node is None:
        return 0
    owed = [following for following, _ in node.next_functions if following is not None]
    own = 0
    if node.name() == "MmBackward0":
        (m, k), (_, n) = node._saved_self_sym_sizes, node._saved_mat2_sym_sizes
        own = 2 * m * k * n * (1 + len(owed))
    return own + sum(map(products, owed))


def work(where: Where) -> Outcome:
    """T4: the operations of a LoRA and of a full training step, by the formula and by the products that autograd runs."""
    d, k, r, n = 96, 64, 4, 10
    x = where.randn(n, k, seed=1).requires_grad_()
    W, A, B = where.randn(d, k, seed=2), where.randn(r, k, seed=3), where.randn(d, r, seed=4)
    full = products((x @ W.clone().requires_grad_().T).grad_fn)
    adapted = products((x @ W.T + (x @ A.requires_grad_().T) @ B.requires_grad_().T).grad_fn)
    measured = (float(adapted), float(full), float(n * flops.training(d, k, r)), float(n * flops.full_training(d, k)))
    return Outcome((284160.0, 368640.0) * 2, measured)


def factor_gradients(where: Where) -> Outcome:
    """T5: dA = s B^T G and dB = s G A^T against autograd."""
    layer = Layer(where)
    dA, dB, G = layer.by_autograd()
    ours_A, ours_B = gradients.factor_gradients(G, layer.A, layer.B, layer.scale)
    return Outcome((0.0, 0.0), (largest(ours_A - dA), largest(ours_B - dB)), rounding=1e4)


def scale_identity(where: Where) -> Outcome:
    """T6: <A, dA> = <B, dB> = <ΔW, G> = dL/dγ by differences of the loss."""
    layer = Layer(where)
    dA, dB, G = layer.by_autograd()
    delta = layer.scale * (layer.B @ layer.A)
    stencil, h = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}, 0.01  # central differences, error O(h^8)
    along = {i: float(layer.loss_of(layer.W + (1 + i * h) * delta)) for i in range(-4, 5)}
    slope = sum(c * (along[i] - along[-i]) for i, c in stencil.items()) / h
    found = gradients.scale_derivative(layer.A, dA, layer.B, dB)
    other = gradients.scale_derivative(layer.B, dB, layer.A, dA)
    value = float((delta * G).sum())
    return Outcome((value, value, value, 0.0), (found.value, other.value, slope, found.mismatch), rounding=1e4)


def component_sensitivities(where: Where) -> Outcome:
    """T7: u_i^T G v_i from dB and the factors, and that they add up to dL/dγ."""
    layer = Layer(where)
    dA, dB, G = layer.by_autograd()
    S, ours = gradients.component_sensitivities(layer.A, layer.B, dB, layer.scale)
    U, _, vh = torch.linalg.svd(layer.scale * (layer.B @ layer.A), full_matrices=False)
    direct = (U[:, :3].T @ G * vh[:3]).sum(1)
    total = gradients.scale_derivative(layer.A, dA, layer.B, dB).value
    return Outcome((0.0, total), (largest(ours - direct), float((S * ours).sum())), rounding=1e5)


def drift(where: Where) -> Outcome:
    """T8: one SGD step changes A A^T - B^T B by lr^2 (dA dA^T - dB^T dB), and rebalancing brings it to zero."""
    layer, lr = Layer(where), 0.01
    A, B = layer.A.double(), layer.B.double()
    dA, dB = gradients.factor_gradients(layer.by_autograd()[2], A, B, layer.scale)
    A1, B1 = A - lr * dA, B - lr * dB
    moved = (A1 @ A1.T - B1.T @ B1) - (A @ A.T - B.T @ B)
    balanced = gauge.rebalance(A, B)
    same = largest(balanced[1] @ balanced[0] - B @ A)
    return Outcome((0.0,) * 3, (largest(moved - gauge.drift(dA, dB, lr)), gauge.imbalance(*balanced), same))


def lora_plus(where: Where) -> Outcome:
    """T9: with rates 1 and 16 gradient flow keeps A A^T / lr_A - B^T B / lr_B, and not A A^T - B^T B."""
    M, A, B = (
        where.randn(6, 5, seed=30).double(),
        where.randn(2, 5, seed=31).double(),
        where.randn(6, 2, seed=32).double(),
    )
    rates, dt = (1.0, 16.0), 2e-3

    def slope(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        dA, dB = gradients.factor_gradients(B @ A - M, A, B, 1.0)
        return -rates[0] * dA, -rates[1] * dB

    kept, plain = gauge.conserved(A, B, *rates), A @ A.T - B.T @ B
    for _ in range(200):  # Runge-Kutta of fourth order
        k1 = slope(A, B)
        k2 = slope(A + dt / 2 * k1[0], B + dt / 2 * k1[1])
        k3 = slope(A + dt / 2 * k2[0], B + dt / 2 * k2[1])
        k4 = slope(A + dt * k3[0], B + dt * k3[1])
        A, B = (p + dt / 6 * (a + 2 * b + 2 * c + e) for p, a, b, c, e in zip((A, B), k1, k2, k3, k4, strict=True))
    plain_moved = largest(A @ A.T - B.T @ B - plain) > 0.1
    return Outcome((0.0, 1.0), (largest(gauge.conserved(A, B, *rates) - kept), float(plain_moved)), tolerance=1e-4)


# --- curvature --------------------------------------------------------------------------------------------------------


def bilinear_hessian(where: Where, M: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Give the Hessian of 1/2 ||s·B·A - M||_F^2 in (A, B) by autograd."""
    split = A.numel()

    def loss(flat: Tensor) -> Tensor:
        return (scale * flat[split:].view_as(B) @ flat[:split].view_as(A) - M).square().sum() / 2

    return cast(Tensor, torch.autograd.functional.hessian(loss, torch.cat([A.flatten(), B.flatten()])))


def _kept(
    where: Where, sigma: list[float], kept: list[int], d: int, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    M, A, B = (torch.zeros(n, m, dtype=torch.float64) for n, m in ((d, k), (len(kept), k), (d, len(kept))))
    for i, value in enumerate(sigma):
        M[i, i] = value
    for row, i in enumerate(kept):
        A[row, i] = B[i, row] = (sigma[i] / scale) ** 0.5
    return M.to(where.device, where.dtype), A.to(where.device, where.dtype), B.to(where.device, where.dtype)


def hessian_spectrum(where: Where) -> Outcome:
    """T10: the Hessian at the balanced optimum of diag(3, 1) in (5, 4), r = 2, s = 1 and 2.5: all 18 eigenvalues."""
    expected, measured = [], []
    for scale in (1.0, 2.5):
        H = bilinear_hessian(where, *_kept(where, [3.0, 1.0], [0, 1], 5, 4, scale), scale)
        closed = curvature.bilinear_spectrum([3.0, 1.0, 0.0, 0.0], [0, 1], 5, 4, 2, scale)
        values = torch.linalg.eigvalsh(H.double())
        expected += [0.0, 6 * scale, 36 * scale]
        measured += [largest(values.cpu() - closed), float(values[-1]), float(H.diagonal().sum())]
    return Outcome(tuple(expected), tuple(measured), rounding=1e4)


def saddle(where: Where) -> Outcome:
    """T11: keeping only σ = 2 of diag(3, 2, 1) is a saddle with these six eigenvalues; at zero they are ± σ."""
    M, A, B = _kept(where, [3.0, 2.0, 1.0], [1], 3, 3, 1.0)
    at_two = torch.linalg.eigvalsh(bilinear_hessian(where, M, A, B, 1.0))
    at_zero = torch.linalg.eigvalsh(bilinear_hessian(where, M, 0 * A, 0 * B, 1.0))
    closed = [curvature.bilinear_spectrum([3.0, 2.0, 1.0], kept, 3, 3, 1) for kept in ([1], [])]
    expected = (-1.0, 0.0, 1.0, 3.0, 4.0, 5.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0)
    apart = (largest(at_two.cpu() - closed[0]), largest(at_zero.cpu() - closed[1]))
    return Outcome((*expected, 0.0, 0.0), (*at_two.tolist(), *at_zero.tolist(), *apart), rounding=1e4)


def lanczos(where: Where) -> Outcome:
    """T12: Lanczos sees the six distinct eigenvalues and stops; Hutchinson's trace and its spread."""
    H = bilinear_hessian(where, *_kept(where, [3.0, 1.0], [0, 1], 5, 4, 1.0), 1.0)
    found = curvature.lanczos(lambda v: H @ v, where.randn(18, seed=40), 18, tolerance=1e-5)
    probes = 4000
    trace = curvature.hutchinson(lambda v: H @ v, H[0], probes, torch.Generator().manual_seed(41))
    variance = float(2 * (H.square().sum() - H.diagonal().square().sum()))
    values = found.values.tolist() if found.steps == 6 else [float("nan")] * 6
    within = abs(trace.mean - 36) < 5 * trace.se and abs(trace.se**2 * probes - 64) < 8
    return Outcome((0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 64.0, 1.0), (*values, variance, float(within)), rounding=1e5)


def adam_threshold(where: Where) -> Outcome:
    """T13: descent with a running mean of the gradient is stable at lr λ = 37.9 and diverges at 38.1; plain at 1.99 and 2.01."""

    def grows(step: float, beta: float) -> float:
        x, mean = where.tensor(1.0), where.tensor(0.0)
        for _ in range(600):
            mean = beta * mean + (1 - beta) * step * x
            x = x - mean
        return float(abs(float(x)) > 1)

    measured = (grows(37.9, 0.9), grows(38.1, 0.9), grows(1.99, 0.0), grows(2.01, 0.0))
    return Outcome(
        (0.0, 1.0, 0.0, 1.0, 38.0, 2.0), (*measured, curvature.adam_threshold(1.0), curvature.gd_threshold(1.0))
    )


def curve_exponent(where: Where) -> Outcome:
    """T36: the exponent of steps^-p is p wherever it was evaluated, that of a flat curve 0, of a rising one negative."""
    measured = [
        gain.curve_exponent([(t, 3 * t**-p) for t in steps])
        for p, steps in ((0.3, (10, 20, 40)), (0.05, (3, 7, 16)), (0.0, (8, 16)), (-0.5, (50, 100)))
    ]
    unknown = gain.curve_exponent([(1, 3.0), (90, 2.0), (100, 1.9)])
    return Outcome((0.3, 0.05, 0.0, -0.5, 1.0), (*measured, float(unknown != unknown)))


def gain_ratio(where: Where) -> Outcome:
    """T14: 1/2 at lr = 1/λ on a quadratic, 1 in the limit of small steps, NaN where the step climbs."""
    ratios = []
    for lr in (1 / 3, 1e-3):
        x = where.tensor(2.0)
        step = -lr * 3 * x
        ratios.append(gain.gain_ratio(float(1.5 * x**2), float(1.5 * (x + step) ** 2), float(3 * x * step)))
    climbs = gain.gain_ratio(1.0, 2.0, 0.5)
    return Outcome(
        (0.5, 1 - 1.5e-3, 1.0),
        (*ratios, float(climbs != climbs)),
        rounding=1e6 if where.dtype == torch.float64 else 1e4,
    )


def coupling(where: Where) -> Outcome:
    """T15: the covariance of the factors' gradients, over all pairs of 4 values of g and 5 of x."""
    d, k, r, scale = 3, 4, 2, 1.5
    A, B = where.randn(r, k, seed=50), where.randn(d, r, seed=51)
    g, x = where.randn(4, d, seed=52), where.randn(5, k, seed=53)
    found = gradients.coupling(A, B, scale, g.T @ g / 4, x.T @ x / 5)
    Ax, Bg = x @ A.T, g @ B
    dB = scale * torch.einsum("gb,nj->gnbj", g, Ax)
    dA = scale * torch.einsum("gi,na->gnia", Bg, x)
    AA = torch.einsum("gnia,gnjb->iajb", dA, dA) / 20
    BB = torch.einsum("gnbi,gncj->bicj", dB, dB) / 20
    AB = torch.einsum("gnia,gnbj->iabj", dA, dB) / 20
    apart = (largest(found.AA - AA), largest(found.BB - BB), largest(found.AB - AB))
    return Outcome((0.0,) * 4, (*apart, gradients.coupling(A, 0 * B, scale, g.T @ g, x.T @ x).strength), rounding=1e4)


def random_projection(where: Where) -> Outcome:
    """T16: SGD on B with A frozen moves W by -lr s^2 G A^T A; a random A captures r/k; the tangent identity."""
    d, k, r, scale, lr = 24, 512, 8, 2.0, 0.1
    bound = k**-0.5
    G, A = where.randn(d, k, seed=60).double(), (bound * (2 * where.rand(r, k, seed=61) - 1)).double()
    B = torch.zeros(d, r, device=where.device, dtype=A.dtype)
    total = torch.zeros_like(G)
    for step in range(3):
        gradient = (step + 1) * G
        total += gradient
        B = B - lr * gradients.factor_gradients(gradient, A, B, scale)[1]
    flora = largest(scale * B @ A + lr * scale**2 * total @ A.T @ A)
    shares = [gradients.capture(G, bound * (2 * where.rand(r, k, seed=100 + i) - 1)) for i in range(40)]
    B1 = where.randn(d, 3, seed=62).double()
    P, Q = torch.linalg.qr(B1)[0], torch.linalg.qr(A.T)[0]
    outside = (G - P @ (P.T @ G)) @ (torch.eye(k, device=G.device, dtype=G.dtype) - Q @ Q.T)
    tangent = float(1 - outside.square().sum() / G.square().sum())
    measured = (
        flora,
        gradients.tangent_capture(G, A, B1) - tangent,
        gradients.movement(2 * A, A),
        sum(shares) / len(shares),
    )
    return Outcome((0.0, 0.0, 1.0, r / k), measured, tolerance=8e-4)


def first_step(where: Where) -> Outcome:
    """T17: ||ΔW|| after Adam's first step, ||A_0||^2 and the gradient of B at the start, all over their formulas."""
    d, k, r, alpha, lr, draws = 384, 512, 8, 16.0, 2e-4, 8
    scale = alpha / r
    norm_A, norm_dB = gradients.initial_norms(k, r, scale)
    ratios = []
    for seed in range(draws):
        A = k**-0.5 * (2 * where.rand(r, k, seed=700 + seed) - 1)
        G = where.randn(d, k, seed=800 + seed)
        dB = scale * G @ A.T
        mean, square = 0.1 * dB, 0.001 * dB.square()  # Adam's moments after one step, before they are corrected for it
        B = -lr * (mean / 0.1) / ((square / 0.001).sqrt() + 1e-12)
        moved = float(scale * torch.linalg.matrix_norm(B @ A))
        predicted = gradients.adam_first_update(d, r, scale, lr)
        shares = float(A.square().sum()) / norm_A, float(dB.square().sum() / G.square().sum()) / norm_dB
        ratios.append([moved / predicted, *shares])
    mean = torch.tensor(ratios).mean(0).tolist()
    return Outcome((1.0, 1.0, 1.0, 0.0128), (*mean, gradients.adam_first_update(d, r, scale, lr)), tolerance=0.02)
