"""Each fused operation against its plain twin: values and gradients, in fp64 and in the dtypes of training."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core.errors import UsageError
from lorakit.kernels import attention, cross_entropy, gated, low_rank, norm, rotary
from lorakit.kernels.gated import GELU_TANH, SILU, Activation, Gated
from lorakit.kernels.low_rank import SAME, LowRank, Projection, Prologue, Routed, add, plain, project
from lorakit.kernels.norm import RMSNorm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    assert (a - b).norm() <= TOLERANCE[dtype] * b.norm()


class Differentiable:
    """The twin of a prologue, differentiable by torch."""

    recomputes = True

    def __init__(self, prologue: Prologue) -> None:
        self.prologue = prologue

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, None]:
        if isinstance(self.prologue, RMSNorm):
            return norm.reference(inputs[0], self.prologue.weight, self.prologue.eps, wide=self.prologue.wide), None
        if isinstance(self.prologue, Gated):
            return gated.reference(inputs[0], inputs[1], self.prologue.activation), None
        return inputs[0], None

    def backward(self, dh: Tensor, way: None) -> tuple[Tensor, ...]:
        raise AssertionError("autograd's business")


class Problem:
    """Three projections of one input, 37 rows: with a change, without, with another rank and a gain."""

    def __init__(self, prologue: Prologue, dtype: torch.dtype, *, dropout: float = 0.0, gain: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)

        def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        self.prologue, self.dtype = prologue, dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.inputs = [random(1, 37, 24).requires_grad_() for _ in range(2 if isinstance(prologue, Gated) else 1)]
        self.residual = random(1, 37, 20).requires_grad_()
        self.leaves = [*self.inputs, self.residual]
        self.projections = []
        for out, rank in ((20, 4), (12, 0), (16, 3)):
            change = None
            if rank:
                A, B = random(rank, 24, dtype=wide).requires_grad_(), random(out, rank, dtype=wide).requires_grad_()
                own = (random(out, dtype=wide) + 2).requires_grad_() if gain else None
                change = LowRank(A, B, torch.tensor(1.7, dtype=wide), dropout, own)
                self.leaves += [A, B, *([own] if own is not None else [])]
            W, b = random(out, 24), random(out)
            self.projections.append(Projection(lambda W=W: W, b if out == 12 else None, change))
        self.weights = [random(1, 37, p.matrix().shape[0]) for p in self.projections]

    def run(self, function: object, prologue: Prologue) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(5)
        ys = function(self.inputs, self.projections, prologue=prologue, residual=self.residual)  # type: ignore[operator]
        loss = sum((y * w).sum() for y, w in zip(ys, self.weights, strict=True))
        return ys, list(torch.autograd.grad(loss, self.leaves))


def prologues(dtype: torch.dtype) -> dict[str, Prologue]:
    weight = torch.linspace(0.5, 1.5, 24, dtype=dtype)
    return {
        "same": SAME,
        "norm": RMSNorm(weight, 1e-5),
        "wide norm": RMSNorm(weight.to(torch.promote_types(dtype, torch.float32)), 1e-5, wide=True),
        "silu": Gated(SILU),
        "gelu": Gated(GELU_TANH),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", prologues(torch.float64))
@pytest.mark.parametrize("gain", [False, True], ids=["", "gain"])
def test_projections_agree_with_their_twin(name: str, dtype: torch.dtype, gain: bool) -> None:
    p = Problem(prologues(dtype)[name], dtype, gain=gain)
    ys, gradients = p.run(project, p.prologue)
    expected, twins = p.run(low_rank.reference, Differentiable(p.prologue))
    for a, b in itertools.chain(zip(ys, expected, strict=True), zip(gradients, twins, strict=True)):
        close(a, b, dtype)


@pytest.mark.parametrize("name", ["same", "norm", "silu"])
def test_dropout_is_torchs_own_and_the_same_going_back(name: str) -> None:
    p = Problem(prologues(torch.float64)[name], torch.float64, dropout=0.4)
    ys, gradients = p.run(project, p.prologue)
    expected, twins = p.run(low_rank.reference, Differentiable(p.prologue))
    for a, b in itertools.chain(zip(ys, expected, strict=True), zip(gradients, twins, strict=True)):
        close(a, b, torch.float64)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("frozen", ["", "A", "x"])
def test_add_agrees_with_its_twin(dropout: float, frozen: str) -> None:
    p = Problem(SAME, torch.float64, dropout=dropout)
    change, x = p.projections[0].change, p.inputs[0]
    assert change is not None
    if frozen:
        {"A": change.A, "x": x}[frozen].requires_grad_(False)
    leaves = [t for t in (x, p.residual, change.A, change.B) if t.requires_grad]
    torch.manual_seed(2)
    y = add(p.residual * 1, x, change)
    found = torch.autograd.grad((y * p.weights[0]).sum(), leaves)
    torch.manual_seed(2)
    twin = p.residual + F.linear(F.linear(F.dropout(x, dropout), change.A), change.B) * change.scale
    expected = torch.autograd.grad((twin * p.weights[0]).sum(), leaves)
    close(y, twin, torch.float64)
    for a, b in zip(found, expected, strict=True):
        close(a, b, torch.float64)


def saved(run: object, but: list[Tensor]) -> int:
    """Give the bytes that the backward pass of `run()` waits for, each storage once, those of `but` left out."""
    sizes: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in but}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()  # type: ignore[operator]
    return sum(sizes.values())


@pytest.mark.parametrize("name", ["same", "norm", "silu"])
def test_only_the_inputs_and_the_small_products_are_saved(name: str) -> None:
    p = Problem(prologues(torch.float32)[name], torch.float32)
    p.inputs = [x * 1 for x in p.inputs]  # no leaves, so that they count
    given = sum(x.nbytes for x in p.inputs)
    assert saved(lambda: project(p.inputs, p.projections, prologue=p.prologue), p.leaves) == given + 37 * (4 + 3) * 4


def test_with_a_frozen_the_input_is_not_saved() -> None:
    """LoRA-FA's point: the gradient of B needs only the r numbers of A x."""
    p = Problem(SAME, torch.float32)
    for q in p.projections:
        if q.change is not None:
            q.change.A.requires_grad_(False)
    p.inputs = [p.inputs[0] * 1]
    assert saved(lambda: project(p.inputs, p.projections), p.leaves) == 37 * (4 + 3) * 4


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rotation_agrees_with_its_twin_and_back(dtype: torch.dtype) -> None:
    x = torch.randn(2, 11, 3, 8, dtype=dtype, requires_grad=True)
    angle = torch.randn(2, 11, 4, dtype=dtype).repeat(1, 1, 2)
    weight = torch.randn(2, 3, 11, 8, dtype=dtype)
    pairs = []
    for function in (rotary.rotate, rotary.reference):
        y = function(x, angle.cos(), angle.sin())
        pairs.append((y, torch.autograd.grad((y * weight).sum(), x)[0]))
    for a, b in zip(*pairs, strict=True):
        close(a, b, dtype)


SOFTMAXES = {
    "blocks": cross_entropy.BLOCKS,
    "whole": cross_entropy.WHOLE,
    "pieces": cross_entropy.WHOLE._replace(most=70),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5, 128, 300])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_cross_entropy_agrees_with_its_twin(name: str, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    h, W = torch.randn(rows, 16, dtype=dtype, requires_grad=True), torch.randn(50, 16, dtype=dtype)
    y = torch.randint(50, (rows,))
    pairs = []
    for losses in (cross_entropy.row_losses(h, W, y, SOFTMAXES[name]), cross_entropy.reference(h, W, y)):
        loss = losses.sum()
        pairs.append((loss, torch.autograd.grad(loss / 7, h)[0]))
    for a, b in zip(*pairs, strict=True):
        close(a, b, dtype)


def test_on_a_processor_the_loss_goes_by_blocks() -> None:
    assert cross_entropy.usual(torch.device("cpu")) is cross_entropy.BLOCKS
    assert cross_entropy.usual(torch.device("cuda")) is cross_entropy.WHOLE


@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_probability_that_fp32_loses_still_has_its_loss(name: str, dtype: torch.dtype) -> None:
    h = torch.tensor([[1.0], [0.5], [1.0]], dtype=dtype, requires_grad=True)
    W, y = torch.tensor([[0.0], [300.0]], dtype=dtype), torch.tensor([0, 0, 1])
    losses = cross_entropy.row_losses(h, W, y, SOFTMAXES[name])
    assert losses.tolist() == [pytest.approx(300.0, rel=1e-6), pytest.approx(150.0, rel=1e-6), 0.0]
    assert torch.autograd.grad(losses.sum(), h)[0].flatten().tolist() == [300.0, 300.0, 0.0]


def test_away_from_a_processor_the_loss_asks_nothing_of_the_values() -> None:
    """What does would make the device wait, and could not be recorded in a CUDA graph. Fake tensors have no values to ask."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        h, W, y = torch.randn(5, 16, requires_grad=True), torch.randn(50, 16), torch.zeros(5, dtype=torch.long)
        cross_entropy.row_losses(h, W, y, cross_entropy.WHOLE).sum().backward()
        with pytest.raises(DataDependentOutputException):
            cross_entropy.row_losses(h, W, y, cross_entropy.BLOCKS)


def test_plain_switches_everything_off_and_on_again() -> None:
    x = torch.randn(2, 3)
    assert low_rank.applies(x)
    with plain():
        assert not low_rank.applies(x)
    assert low_rank.applies(x)
    with torch.no_grad():
        assert not low_rank.applies(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not low_rank.applies(x)


def test_activations_are_their_own_derivatives() -> None:
    x = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    for activation in (SILU, GELU_TANH):
        assert isinstance(activation, Activation)
        (expected,) = torch.autograd.grad(activation.act(x).sum(), x)
        close(activation.back(torch.ones_like(x), x.detach()), expected, torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [3, 9, 9, 4], [16, 1, 16]], ids=str)
@pytest.mark.parametrize("kept", [512, 4])
def test_attention_agrees_with_its_twin(
    dtype: torch.dtype, lengths: list[int], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "ROWS", 4)
    monkeypatch.setattr(attention, "KEPT", kept)
    torch.manual_seed(0)
    leaves = [torch.randn(1, heads, sum(lengths), 8, dtype=dtype, requires_grad=True) for heads in (6, 2, 2)]
    weight, pairs = torch.randn(1, sum(lengths), 6, 8, dtype=dtype), []
    for function in (attention.causal_attention, attention.reference):
        y = function(*leaves, lengths, 0.4)
        pairs.append((y, *torch.autograd.grad((y * weight).sum(), leaves)))
    for a, b in zip(*pairs, strict=True):
        close(a, b, dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["same", "norm", "silu"])
def test_routed_changes_are_each_run_alone_on_its_rows(name: str, dropout: float) -> None:
    """Three adapters of different ranks on 9, 0 and 28 of 37 rows, against a call for each; masks of generators of their own."""
    p, runs = Problem(prologues(torch.float64)[name], torch.float64), [9, 0, 28]
    draw = torch.Generator().manual_seed(1)
    factors = [
        [torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in ((r, 24), (out, r))]
        for out in (20, 16)
        for r in (2, 5, 3)
    ]

    def changes(out: int) -> list[LowRank]:
        seeded = [torch.Generator().manual_seed(7 + k) if dropout else None for k in range(3)]
        own = factors[:3] if out == 20 else factors[3:]
        return [LowRank(A, B, torch.tensor(0.5 + k).double(), dropout, None, seeded[k]) for k, (A, B) in enumerate(own)]

    outs = [bare.matrix().shape[0] for bare in p.projections]
    by_out = {out: None if out == 12 else changes(out) for out in outs}
    leaves = [
        *p.leaves[: len(p.inputs) + 1],
        *[t for pair in (factors[0], factors[2], factors[3], factors[5]) for t in pair],
    ]

    def gradients(ys: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, p.weights, strict=True)), leaves))

    routed = [Routed(own, {37: runs}) if (own := by_out[out]) else None for out in outs]
    projections = [bare._replace(change=change) for bare, change in zip(p.projections, routed, strict=True)]
    ys = project(p.inputs, projections, prologue=p.prologue, residual=p.residual)
    found, by_out = gradients(ys), {out: None if out == 12 else changes(out) for out in outs}

    parts = []
    for k, rows in ((0, slice(0, 9)), (2, slice(9, 37))):
        alone = [
            bare._replace(change=own[k] if (own := by_out[out]) else None)
            for bare, out in zip(p.projections, outs, strict=True)
        ]
        parts.append(project([x[:, rows] for x in p.inputs], alone, prologue=p.prologue, residual=p.residual[:, rows]))
    expected = [torch.cat(pieces, 1) for pieces in zip(*parts, strict=True)]
    for a, b in itertools.chain(zip(ys, expected, strict=True), zip(found, gradients(expected), strict=True)):
        close(a, b, torch.float64)


def test_routed_add_is_each_run_alone_on_its_rows() -> None:
    p = Problem(SAME, torch.float64)
    change, x = p.projections[0].change, p.inputs[0]
    other = LowRank(
        torch.randn(7, 24).double().requires_grad_(), torch.randn(20, 7).double().requires_grad_(), torch.tensor(0.3)
    )
    leaves = [x, p.residual, change.A, change.B, other.A, other.B]
    y = add(p.residual * 1, x, Routed([change, other], {37: [30, 7]}))
    parts = [add(p.residual[:, s] * 1, x[:, s], c) for s, c in ((slice(0, 30), change), (slice(30, 37), other))]
    twin = torch.cat(parts, 1)
    found, expected = (torch.autograd.grad((out * p.weights[0]).sum(), leaves) for out in (y, twin))
    for a, b in zip((y, *found), (twin, *expected), strict=True):
        close(a, b, torch.float64)
    with pytest.raises(UsageError, match="sees 37 rows"):
        add(p.residual * 1, x, Routed([change, other], {36: [30, 6]}))
