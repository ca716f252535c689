"""Another implementation is used only if it is right, and faster by the clock; whatever goes wrong, torch's is."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.kernels import norm, rotary, trials
from lorakit.kernels.choice import PLAIN, Choice, Kernels, Trial, choose
from lorakit.kernels.cross_entropy import BLOCKS, WHOLE
from lorakit.kernels.gated import GELU_TANH, SILU, Gated

NAMES = Kernels._fields


def trials_of(dtype: torch.dtype = torch.float32, rows: int = 40) -> list[Trial]:
    place = trials.Place(torch.device("cpu"), dtype, rows)
    return [
        trials.norm(place, 24, wide=False),
        trials.gate(place, 36, SILU),
        trials.rotation(place, 3, 8),
        trials.softmax(place, 50),
    ]


class Norm(norm.RMSNorm):
    """Another class, so that it can be told apart."""


OTHERS = Kernels(Norm, lambda a: Gated(a), lambda x, cos, sin: rotary.rotate(x, cos, sin), WHOLE)


NAMES = ("norm", "gate", "rotate", "softmax")


def clock(own: float, plain: float) -> Callable[[Callable[[], object]], float]:
    """A timer that runs what it times, ours first, and says what it is told."""
    said: Iterator[float] = iter([own, plain] * 4)

    def time(run: Callable[[], object]) -> float:
        run()
        return next(said)

    return time


def test_the_faster_are_taken() -> None:
    chosen = choose(trials_of(), offered=lambda: OTHERS, timer=clock(1.0, 2.1))
    assert chosen == Choice(OTHERS, "Triton: norm 2.1x, gate 2.1x, rotate 2.1x, softmax 2.1x", NAMES)


@pytest.mark.parametrize("own", [1.0, 1.3, 0.99])
def test_the_slower_and_the_hardly_faster_are_not(own: float) -> None:
    chosen = choose(trials_of(), offered=lambda: OTHERS, timer=clock(own, 1.0))
    assert chosen.kernels == PLAIN and chosen.words.startswith("Triton: nothing; torch: norm (")


def test_each_is_chosen_by_itself() -> None:
    times = iter([1.0, 2.0, 2.0, 1.0, 1.0, 3.0, 4.0, 1.0])
    chosen = choose(trials_of(), offered=lambda: OTHERS, timer=lambda run: next(times))
    assert chosen.kernels == PLAIN._replace(norm=OTHERS.norm, rotate=OTHERS.rotate)
    assert chosen.words == "Triton: norm 2.0x, rotate 3.0x; torch: gate (0.5x), softmax (0.2x)"


def test_what_was_chosen_before_is_not_timed_again() -> None:
    def never(run: Callable[[], object]) -> float:
        raise AssertionError("timed")

    for known in ((), ("gate", "softmax"), NAMES):
        chosen = choose(trials_of(), known, offered=lambda: OTHERS, timer=never)
        assert chosen.names == known
        assert chosen.kernels == PLAIN._replace(**{name: getattr(OTHERS, name) for name in known})
    wrong = OTHERS._replace(norm=lambda w, eps, wide=False: Norm(2 * w, eps, wide=wide))
    assert choose(trials_of(), NAMES, offered=lambda: wrong, timer=never).names == NAMES[1:]


def test_what_is_not_tried_is_torchs() -> None:
    assert choose(trials_of()[:1], offered=lambda: OTHERS, timer=clock(1, 2)).kernels == PLAIN._replace(norm=Norm)


class Spoiled:
    """A prologue with something done to what it gives."""

    recomputes = True

    def __init__(self, inner: Any, h: Callable[[Tensor], Tensor], dx: Callable[[Tensor], Tensor]) -> None:
        self.inner, self.h, self.dx = inner, h, dx

    def forward(self, inputs: Any) -> Any:
        h, way = self.inner.forward(inputs)
        return self.h(h), way

    def backward(self, dh: Tensor, way: Any) -> tuple[Tensor, ...]:
        return tuple(self.dx(x) for x in self.inner.backward(dh, way))


def same(x: Tensor) -> Tensor:
    return x


def one_wrong(x: Tensor) -> Tensor:
    x[-1, -1] += 1.0
    return x


def one_nan(x: Tensor) -> Tensor:
    x[0, 0] = torch.nan
    return x


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda x: x * 1.02,
    "one number": one_wrong,
    "nan": one_nan,
    "dtype": lambda x: x.double(),
    "shape": lambda x: x[:-1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("where", ["h", "dx"])
def test_the_wrong_are_not_taken_however_fast(where: str, fault: str, dtype: torch.dtype) -> None:
    spoil, times = FAULTS[fault], []
    own = {"h": same, "dx": same, where: spoil}
    spoiled = OTHERS._replace(gate=lambda a: Spoiled(Gated(a), own["h"], own["dx"]))
    chosen = choose(trials_of(dtype), offered=lambda: spoiled, timer=lambda run: times.append(run) or 1.0 / len(times))
    assert chosen.kernels.gate is Gated
    assert "gate (does not agree)" in chosen.words
    assert len(times) == 6  # nobody asks how fast it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_loss_and_a_wrong_rotation_are_not_taken(dtype: torch.dtype) -> None:
    wrong = OTHERS._replace(
        softmax=WHOLE._replace(run=lambda *a: WHOLE.run(*a) * 1.001),
        rotate=lambda x, cos, sin: rotary.rotate(x, cos, -sin),
    )
    chosen = choose(trials_of(dtype), offered=lambda: wrong, timer=clock(1, 2))
    assert chosen.kernels == PLAIN._replace(norm=OTHERS.norm, gate=OTHERS.gate)


@pytest.mark.parametrize("error", [ImportError, RuntimeError, AssertionError, UserWarning])
@pytest.mark.parametrize("where", ["import", "run", "timer"])
def test_no_error_gets_out(where: str, error: type[Exception]) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error("no such thing here")

    offered = fails if where == "import" else lambda: OTHERS._replace(gate=fails) if where == "run" else OTHERS
    chosen = choose(trials_of(), offered=offered, timer=fails if where == "timer" else clock(1, 2))
    assert chosen.kernels.gate is Gated and f"gate ({error.__name__})" in chosen.words
    assert (chosen.kernels.norm is Norm) == (where == "run")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [SILU, GELU_TANH])
def test_torchs_own_agree_with_themselves(activation: Any, dtype: torch.dtype) -> None:
    place = trials.Place(torch.device("cpu"), dtype, 40)
    every = [trials.norm(place, 24, wide=True), trials.gate(place, 36, activation), *trials_of(dtype)]
    chosen = choose(every, offered=lambda: PLAIN._replace(softmax=BLOCKS), timer=lambda run: 1.0)
    assert chosen.words.count("(1.0x)") == 6


def test_fp32_statistics_are_not_right_for_fp64() -> None:
    class Narrow(norm.RMSNorm):
        def forward(self, inputs: Any) -> Any:
            h, way = super().forward([inputs[0].float()])
            return h.double(), way

    chosen = choose(trials_of(torch.float64), offered=lambda: OTHERS._replace(norm=Narrow), timer=clock(1, 2))
    assert "norm (does not agree)" in chosen.words


def test_a_trial_is_the_same_each_time() -> None:
    for trial in trials_of():
        for a, b in zip(trial.make(), trial.make(), strict=True):
            assert torch.equal(a, b)
