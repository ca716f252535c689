"""Run by `test_triton_ops.py` in a process of its own, whose TRITON_INTERPRET=1 makes triton run kernels in Python, on a processor.

Each kernel against its plain twin: values and gradients. Exact results are the twin's in fp64; in the dtype at hand a kernel may be
off by the roundings of its results, no matter what the twin's own steps round.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.kernels import choice, cross_entropy, gated, norm, rotary, trials, triton_ops
from lorakit.kernels.gated import GELU_TANH, SILU, Activation
from lorakit.kernels.low_rank import LowRank, Projection, project

assert os.environ["TRITON_INTERPRET"] == "1"
FP32 = 1e-6
ROUNDING = {
    torch.float32: 0.0,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-11,
}  # the interpreter cuts bf16 off: twice a rounding
DTYPES = list(ROUNDING)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, exact: Tensor, roundings: float = 1.0) -> None:
    """Every number within so many roundings of its dtype, and a millionth of the largest one's size."""
    assert found.shape == exact.shape
    bound = roundings * ROUNDING[found.dtype] * exact.abs() + FP32 * exact.abs().max()
    assert ((found.double() - exact).abs() <= bound).all()


def twins(function: Any, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Give value and gradients in fp64."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad((y * dy.double()).sum(), leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (3, 5), (2, 3, 24), (4, 129), (2, 1100), (0, 8)], ids=str)
def test_norm(shape: tuple[int, ...], wide: bool, dtype: torch.dtype) -> None:
    x, dh = (random(*shape, dtype=dtype, seed=seed) for seed in range(2))
    weight = random(shape[-1], dtype=torch.float32 if wide else dtype, seed=2)
    prologue = triton_ops.RMSNorm(weight, 1e-5, wide=wide)
    kept = x.clone()
    h, way = prologue.forward([x])
    (dx,) = prologue.backward(dh.clone(), way)
    assert torch.equal(x, kept) and h.dtype == dx.dtype == dtype
    if not len(x):
        return
    exact, gradient = twins(lambda z: norm.reference(z, weight.double(), 1e-5, wide=wide), [x], dh)
    close(h, exact, 1.0 if wide else 2.1)  # Llama's rounds y, too
    close(dx, gradient)


def test_norm_of_strided_rows() -> None:
    wide, dh = random(6, 40, dtype=torch.float32), random(6, 17, dtype=torch.float32, seed=1)
    weight = random(34, dtype=torch.float32, seed=2)[::2]
    prologue = triton_ops.RMSNorm(weight, 1e-5)
    h, way = prologue.forward([wide[:, 3:37:2]])
    (dx,) = prologue.backward(dh.t().contiguous().t(), way)
    exact, gradient = twins(lambda z: norm.reference(z, weight.double(), 1e-5), [wide[:, 3:37:2]], dh)
    close(h, exact), close(dx, gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [SILU, GELU_TANH], ids=["silu", "gelu"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 341), (2, 3, 400), (0, 8)], ids=str)
def test_gate(shape: tuple[int, ...], activation: Activation, dtype: torch.dtype) -> None:
    gate, up, dh = (random(*shape, dtype=dtype, seed=seed) * 3 for seed in range(3))
    prologue, kept = triton_ops.Gated(activation), (gate.clone(), up.clone())
    h, way = prologue.forward([gate, up])
    found = [h, *prologue.backward(dh.clone(), way)]
    assert all(map(torch.equal, (gate, up), kept)) and {y.dtype for y in found} == {dtype}
    for y, exact in zip(found, twins(lambda g, u: gated.reference(g, u, activation), [gate, up], dh), strict=True):
        if y.numel():
            close(y, exact)


def test_gate_far_from_zero_is_finite() -> None:
    gate = torch.tensor([[-1e4, -90.0, -20.0, 20.0, 90.0, 1e4]])
    for activation in (SILU, GELU_TANH):
        prologue = triton_ops.Gated(activation)
        h, way = prologue.forward([gate, torch.ones_like(gate)])
        dgate, dup = prologue.backward(torch.ones_like(gate), way)
        flat = torch.tensor([[0.0, 0.0, 0.0, 20.0, 90.0, 1e4]])
        for found, exact in ((h, flat), (dup, flat), (dgate, (flat > 0).float())):
            assert torch.allclose(found, exact, atol=1e-6)


def test_another_activation_is_refused() -> None:
    with pytest.raises(KeyError):
        triton_ops.Gated(Activation(torch.relu, lambda g, x: g * (x > 0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 11, 3, 8), (1, 7, 5, 26)], ids=str)
@pytest.mark.parametrize("batch", ["own", "shared"])
def test_rotation(shape: tuple[int, ...], batch: str, dtype: torch.dtype) -> None:
    b, t, heads, d = shape
    x = random(b, t, heads + 2, d, dtype=dtype)[:, :, 1:-1].requires_grad_()  # as q lies beside k and v
    angle = random(
        1 if batch == "shared" else b, t, d, dtype=torch.float32, seed=1
    )  # halves of their own: cos need not repeat
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    dy = random(b, t, heads, d, dtype=dtype, seed=2).transpose(1, 2)
    y = triton_ops.rotate(x, cos, sin)
    assert y.is_contiguous() and y.dtype == dtype
    (dx,) = torch.autograd.grad(y, x, dy)
    exact, gradient = twins(lambda z: rotary.reference(z, cos.double(), sin.double()), [x], dy)
    close(y.detach(), exact), close(dx, gradient)


def test_rotation_of_any_order_of_memory() -> None:
    x = random(8, 2, 3, 5, dtype=torch.float32).permute(1, 3, 2, 0)
    cos, sin = (random(8, 5, 2, dtype=torch.float32, seed=seed).permute(2, 1, 0) for seed in (1, 2))
    close(triton_ops.rotate(x, cos, sin), rotary.reference(x.double(), cos.double(), sin.double()))


def test_a_rotation_of_half_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="no rotation"):
        triton_ops.rotate(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 50), (4, 4096), (2, 9000), (0, 5)])
def test_softmax(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits = random(rows, vocabulary, dtype=dtype) * 5
    targets = torch.arange(rows) * 1237 % vocabulary
    logs = torch.log_softmax(logits.double(), -1)
    losses = triton_ops.softmax(logits, targets)
    assert losses.dtype == torch.float32 and losses.shape == (rows,)
    if rows:
        close(losses, -logs.gather(1, targets[:, None])[:, 0])
        close(logits, logs.exp())


def test_softmax_of_a_lost_a_sure_and_a_masked_target() -> None:
    """The target's probability underflows; it is 1 to the last bit; a whole block of logits is -inf."""
    logits = torch.zeros(3, 5000)
    logits[0, 7], logits[1, 4999], logits[2, :4500] = 300.0, 15.0, -float("inf")
    targets = torch.tensor([3, 4999, 4600])
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    losses = triton_ops.softmax(logits, targets)
    assert ((losses - exact).abs() <= FP32 * exact + 1e-7).all()
    assert torch.isfinite(logits).all() and float((logits.sum(1) - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("most", [2, 1 << 31])
def test_cross_entropy_by_the_kernel(most: int, dtype: torch.dtype) -> None:
    h, weight = random(70, 16, dtype=dtype).requires_grad_(), random(50, 16, dtype=dtype, seed=1)
    targets, softmax = torch.arange(70) % 50, cross_entropy.WHOLE._replace(run=triton_ops.softmax, most=most)
    pairs = []
    for run in (
        lambda: cross_entropy.row_losses(h, weight, targets, softmax).sum(),
        lambda: cross_entropy.reference(h, weight, targets),
    ):
        loss = run()
        pairs.append((loss.detach(), *torch.autograd.grad(loss, h)))
    for a, b in zip(*pairs, strict=True):
        assert (a - b).norm() <= (1e-6 if dtype == torch.float32 else 2e-2) * b.norm()


@pytest.mark.parametrize("name", ["norm", "gate"])
def test_a_projection_runs_with_either_prologue(name: str) -> None:
    """The way that forward gives is the one that backward takes, inside the fused operation, which overwrites what it may."""
    inputs = [
        random(1, 37, 24, dtype=torch.float32, seed=seed).requires_grad_() for seed in range(1 + (name == "gate"))
    ]
    A, B, W = (random(*shape, dtype=torch.float32, seed=9).requires_grad_() for shape in ((3, 24), (20, 3), (20, 24)))
    layer = [Projection(W.detach, None, LowRank(A, B, torch.tensor(1.7), 0.0, None))]
    made = {
        "norm": [m.RMSNorm(torch.linspace(0.5, 1.5, 24), 1e-5) for m in (triton_ops, norm)],
        "gate": [m.Gated(SILU) for m in (triton_ops, gated)],
    }
    results = []
    for prologue in made[name]:
        (y,) = project(inputs, layer, prologue=prologue)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), [*inputs, A, B])))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [576, 1161])
def test_the_trials_on_a_gpu_would_find_them_right(hidden: int, dtype: torch.dtype) -> None:
    """Not in bf16, of which the interpreter loses twice what torch does."""
    place, offered = trials.Place(torch.device("cpu"), dtype, rows=7), choice.triton_kernels()
    every = [trials.norm(place, hidden, wide=wide) for wide in (False, True)]
    every += [trials.gate(place, 3 * hidden, activation) for activation in (SILU, GELU_TANH)]
    every += [trials.rotation(place, 9, hidden // 18 * 2), trials.softmax(place, 17 * hidden)]
    for trial in every:
        assert choice.agrees(trial, getattr(offered, trial.name), getattr(choice.PLAIN, trial.name)), trial.name
    assert choice.choose(every, timer=lambda run: 1.0).words.count("(1.0x)") == 6
