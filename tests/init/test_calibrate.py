"""What is measured of layers, against the inputs and gradients themselves, for every layer kind and base."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.core.calibrate import Calibration, calibrate
from lorakit.core.statistics import Statistics


class Both:
    """A stand-in for a method that needs everything; the patterns of `attach` ask for r and alpha."""

    r, alpha = 2, 4.0

    def build(self, shape: Any) -> Any:
        raise AssertionError("nothing is built to measure")


EVERYTHING = frozenset({"inputs", "gradient"})


@pytest.fixture(autouse=True)
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.core.calibrate.needs", lambda method: EVERYTHING)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (
        model(batch).float().square().mean() if model[0].weight.dtype != torch.float64 else model(batch).square().mean()
    )


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[nn.Module, Tensor], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 7, 6), lambda layer, x: x.reshape(-1, 6)),
    "conv1d_gpt2": (lambda: Conv1D(5, 6), (4, 7, 6), lambda layer, x: x.reshape(-1, 6)),
    "conv2d": (
        lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)),
        (2, 3, 8, 9),
        lambda layer, x: (
            F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2).reshape(-1, 18)
        ),
    ),
    "conv1d": (
        lambda: nn.Conv1d(3, 5, 4, stride=2),
        (2, 3, 11),
        lambda layer, x: x.unfold(2, 4, 2).transpose(1, 2).reshape(-1, 12),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [1, 2 << 30])
def test_moments_and_gradients_are_the_mean_over_batches(kind: str, at_once: int) -> None:
    """Against the rows cut out by torch, and against autograd on the weight itself."""
    make, shape, rows = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Tanh()).double()
    batches = [torch.randn(shape).double() + 0.3 for _ in range(3)]
    found = calibrate(model, Both(), batches, loss, target_modules=["0"], at_once=at_once)["0"]
    seen = torch.cat([rows(model[0], x) for x in batches])
    torch.testing.assert_close(found.inputs, seen.T @ seen / len(seen))
    torch.testing.assert_close(found.mean, seen.mean(0))
    gradient = sum(torch.autograd.grad(loss(model, x), model[0].weight)[0] for x in batches) / 3
    gradient = gradient.T if isinstance(model[0], Conv1D) else gradient.flatten(1)
    torch.testing.assert_close(found.gradient, gradient)


class Deep(nn.Module):
    """Dropout, a layer that is run twice, one that is given its input by name, and one that is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.twice, self.named, self.idle = (
            nn.Linear(8, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 3),
            nn.Linear(2, 2),
        )
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(torch.relu_(self.up(x)))  # in place, on the output that is watched
        return self.named(input=self.dropout(torch.tanh(self.twice(torch.tanh(h)))))


@pytest.fixture
def deep() -> Deep:
    torch.manual_seed(0)
    return Deep()


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_a_model_is_measured_as_it_is_evaluated_and_left_as_it_was(deep: Deep) -> None:
    deep.up.weight.requires_grad_(False)
    deep.dropout.eval()
    before = {n: (p.clone(), p.requires_grad) for n, p in deep.named_parameters()}
    modes = [m.training for m in deep.modules()]
    targets = {"target_modules": ["up", "twice", "named"]}
    found = calibrate(deep, Both(), batches(), square, **targets)
    statistics = dict(found)
    assert modes == [m.training for m in deep.modules()]
    assert all(not m._forward_hooks for m in deep.modules())
    for name, p in deep.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
    reference = copy.deepcopy(deep).eval().requires_grad_()
    sum(square(reference, x) for x in batches()).div(3).backward()
    for name in ("up", "twice", "named"):
        gradient = reference.get_submodule(name).weight.grad
        torch.testing.assert_close(statistics[name].gradient, gradient, rtol=1e-4, atol=1e-7)


def test_groups_and_repetition_change_no_bit(deep: Deep) -> None:
    targets = {"target_modules": ["up", "twice", "named"]}
    whole = calibrate(deep, Both(), batches(), square, **targets)
    apart = calibrate(deep, Both(), batches(), square, at_once=1, **targets)
    assert [len(g) for g in whole._groups] == [3]
    assert [len(g) for g in apart._groups] == [1, 1, 1]
    for path in whole:
        for field in ("inputs", "mean", "gradient"):
            assert torch.equal(vars(whole[path])[field], vars(apart[path])[field])
        assert list(apart._latest) == [path], "only the latest group is kept"


def test_statistics_asked_for_while_adapters_start_are_those_of_the_base(
    deep: Deep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    method, targets = lk.LoRA(r=1, init="lora_ga"), {"target_modules": ["up", "twice", "named"]}
    before = {p: copy.deepcopy(s) for p, s in calibrate(deep, method, batches(), square, **targets).items()}
    late = calibrate(deep, method, batches(), square, at_once=1, **targets)
    lk.attach(deep, method, statistics=late, **targets)
    for path, _, adapter in lk.adapters(deep):
        U = torch.linalg.svd(before[path].gradient)[0][:, 1]
        B = adapter.live.lora_B.detach()[:, 0]
        assert abs(float(U @ B / B.norm())) > 1 - 1e-4


@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_bf16_and_4_bit_bases_are_measured_in_fp32(base: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8))
    x = [torch.randn(32, 64) for _ in range(2)]
    if base == "bfloat16":
        model, tolerance = model.bfloat16(), 3e-2
        reference, inputs = copy.deepcopy(model).float(), [b.bfloat16() for b in x]
    else:
        pytest.importorskip("bitsandbytes")
        from lorakit.models.quantize import dequantize, quantize

        quantize(model, "nf4")
        reference, inputs, tolerance = dequantize(copy.deepcopy(model)), x, 1e-5
    found = calibrate(model, Both(), inputs, loss)
    exact = calibrate(reference, Both(), [b.float() for b in inputs], loss)
    for path in ("0", "2"):
        for field in ("inputs", "gradient"):
            value, wanted = vars(found[path])[field], vars(exact[path])[field]
            assert value.dtype == torch.float32
            assert (value - wanted).norm() < tolerance * wanted.norm()


def test_what_cannot_be_measured_is_an_error(deep: Deep) -> None:
    with pytest.raises(lk.LorakitError, match="idle was never run"):
        calibrate(deep, Both(), batches(), square, target_modules=["up", "idle"])["idle"]
    with pytest.raises(lk.LorakitError, match="NaN"):
        calibrate(deep, Both(), [torch.full((2, 8), torch.nan)], square, target_modules=["up"])["up"]
    with pytest.raises(lk.LorakitError, match="no batches"):
        calibrate(deep, Both(), [], square, target_modules=["up"])
    with pytest.raises(KeyError):
        calibrate(deep, Both(), batches(), square, target_modules=["up"])["twice"]
    assert all(not m._forward_hooks for m in deep.modules())


def test_embeddings_are_left_out() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 3))
    ids = [torch.arange(9)]
    found = calibrate(model, Both(), ids, square, target_modules=["0", "1"])
    assert list(found) == ["1"]
    lk.attach(model, lk.LoRA(r=2, init="eva"), statistics=found, target_modules=["0", "1"])


def test_rows_of_a_fused_layer() -> None:
    whole = Statistics(torch.eye(3), torch.ones(3), torch.arange(12.0).reshape(4, 3), torch.ones(4, 3))
    part = whole.rows(torch.tensor([2, 0]))
    assert part.inputs is whole.inputs
    assert torch.equal(part.gradient, whole.gradient[[2, 0]])
    assert part.residual.shape == (2, 3)


def test_it_is_a_mapping(deep: Deep) -> None:
    found = calibrate(deep, Both(), batches(), square, target_modules=["up", "named"])
    assert isinstance(found, Calibration)
    assert (list(found), len(found), found.get("twice")) == (["up", "named"], 2, None)
