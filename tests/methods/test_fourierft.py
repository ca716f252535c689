"""FourierFT against its closed forms and against PEFT's entries and layer."""

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core.errors import UsageError

from .allocations import NothingAsLargeAs
from .oracle import Twins
from .problem import IN, OUT, Problem, close, perturb

FourierFT = lk.METHODS["fourierft"]


@pytest.mark.parametrize(("inner", "out"), [(IN, OUT), (OUT, IN), (8, 8)])
def test_the_change_is_a_sum_of_cosines(inner: int, out: int) -> None:
    """Entry (u, v) of the spectrum is the wave cos(2 pi (u o / out + v i / in)) / (out in)."""
    torch.manual_seed(0)
    layer = nn.Linear(inner, out).double()
    model = lk.attach(nn.Sequential(layer), FourierFT(n_frequency=9, scaling=5.0))
    ((_, _, adapter),) = lk.adapters(model)
    perturb(adapter)
    o, i = torch.arange(out).double()[:, None], torch.arange(inner).double()
    expected = torch.zeros(out, inner).double()
    for (u, v), c in zip(adapter.entries.T.tolist(), adapter.fourierft_spectrum.tolist(), strict=True):
        expected += 5 * c * torch.cos(2 * torch.pi * (u * o / out + v * i / inner)) / (out * inner)
    close(adapter.delta_weight().detach(), expected, 1e-13)
    x = torch.randn(5, inner).double()
    close(model(x) - layer.frozen(x), x @ expected.T, 1e-13)


def test_the_first_gradient_is_the_spectrum_of_the_matrixs() -> None:
    """The transform's adjoint: dL/dc = s Re(fft2(G)) / (out in) at the entries."""
    p = Problem(FourierFT(n_frequency=20, scaling=5.0)).backward()
    u, v = p.adapter.entries
    close(p.adapter.fourierft_spectrum.grad, 5 * torch.fft.fft2(p.gradient()).real[u, v] / (OUT * IN))


@pytest.mark.parametrize(("seed", "n", "inner", "out"), [(777, 100, 12, 20), (3, 1, 20, 12), (0, 240, 12, 20)])
def test_the_entries_are_pefts(seed: int, n: int, inner: int, out: int) -> None:
    config = peft.FourierFTConfig(n_frequency=n, random_loc_seed=seed, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(inner, out)), config).base_model.model[0]
    model = lk.attach(nn.Sequential(nn.Linear(inner, out)), FourierFT(n_frequency=n, random_loc_seed=seed))
    ((_, _, adapter),) = lk.adapters(model)
    assert torch.equal(adapter.entries, theirs.indices["default"])
    assert len(set(map(tuple, adapter.entries.T.tolist()))) == n


def test_the_draw_does_not_touch_the_global_generator_and_is_made_once_a_size() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    shared = FourierFT(n_frequency=7).shared([])
    shapes = [lk.core.adapter.Shape(*s) for s in ((6, 4), (4, 6), (8, 3), (5, 5))]
    built = [shared.build(shape) for shape in shapes]
    assert set(shared.drawn) == {24, 25}
    alone = [FourierFT(n_frequency=7).build(shape) for shape in shapes]
    assert all(torch.equal(a.entries, b.entries) for a, b in zip(built, alone, strict=True))
    for adapter in built + alone:
        adapter.fourierft_spectrum.data.zero_()
    assert torch.equal(torch.randn(3), expected)


def test_a_small_layer_trains_its_whole_spectrum() -> None:
    """With all entries any change is within reach: real parts of cosines and, by the pairs (u, v), (-u, -v), no sines."""
    p = Problem(FourierFT(n_frequency=1000))
    assert p.adapter.fourierft_spectrum.shape == (OUT * IN,)
    assert len(set(map(tuple, p.adapter.entries.T.tolist()))) == OUT * IN


def test_against_pefts_layer() -> None:
    torch.manual_seed(0)
    config = peft.FourierFTConfig(n_frequency=50, scaling=40.0)
    twins = Twins(nn.Linear(12, 20), FourierFT(n_frequency=50, scaling=40.0), config)
    twins.agree(torch.randn(3, 5, 12), 2e-6)


def test_transforming_the_vectors_is_as_exact_as_the_matrix() -> None:
    """In fp32, both against float64."""
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 128, bias=False), torch.randn(64, 96)
    model = lk.attach(nn.Sequential(layer), FourierFT(n_frequency=500))
    ((_, _, adapter),) = lk.adapters(model)
    with torch.no_grad():
        adapter.fourierft_spectrum.normal_()
        ours, matrix = adapter.delta(x, layer), x @ adapter.delta_weight().T
        model.double()
        exact = x.double() @ adapter.delta_weight().T
    assert (ours - exact).norm() < 2 * (matrix - exact).norm()


def test_one_token_makes_nothing_of_the_size_of_the_matrix() -> None:
    layer, x = nn.Linear(1024, 1024, bias=False), torch.randn(1, 1024)
    model = lk.attach(nn.Sequential(layer), FourierFT())
    ((_, _, adapter),) = lk.adapters(model)

    with torch.no_grad(), NothingAsLargeAs(1024 * 1024 // 8, [layer.weight]):
        adapter.delta(x, layer)


@pytest.mark.parametrize(
    "bad", [{"n_frequency": 0}, {"scaling": 0.0}, {"scaling": float("nan")}, {"random_loc_seed": 2**70}]
)
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        FourierFT(**bad)
