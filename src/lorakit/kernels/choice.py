"""Which of two implementations of an operation runs: torch's own, or Triton's where it is right and faster on this machine.

Nobody knows beforehand which is faster: it depends on the GPU, the model's sizes, the versions of Triton and torch. So each operation
is tried on a `Trial` of the model's sizes (`trials.py`). Its results must be right and it must take less time. Anything else,
whatever goes wrong, means torch's.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cross_entropy import WHOLE, Softmax
from .gated import Gated
from .low_rank import Prologue
from .norm import RMSNorm
from .rotary import rotate

WORTH = 1.05  # times faster; less is noise
_SLACK = 16  # roundings of an fp32 number, for statistics of another order
_ROUNDS, _CALLS = 5, 10


class Kernels(NamedTuple):
    """The operations of which there are two implementations.

    norm: (weight, eps, wide=) -> prologue
    gate: activation -> prologue
    rotate: (x, cos, sin) -> y
    softmax: of the loss; None for the usual one of the device
    """

    norm: Callable[..., Prologue] = RMSNorm
    gate: Callable[..., Prologue] = Gated
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate
    softmax: Softmax | None = None


PLAIN = Kernels()


class Choice(NamedTuple):
    """What was chosen, and how it came to that."""

    kernels: Kernels = PLAIN
    words: str = ""
    names: tuple[str, ...] = ()
    """Of the operations that are Triton's."""


TORCH = Choice()


class Trial(NamedTuple):
    """An operation on inputs of the sizes at hand. `run` gives results and gradients, and may overwrite the inputs."""

    name: str
    """Its field in `Kernels`."""
    make: Callable[[], list[Tensor]]
    run: Callable[[Any, list[Tensor]], list[Tensor]]


Timer = Callable[[Callable[[], object]], float]


def triton_kernels() -> Kernels:
    """Give Triton's. ImportError without triton."""
    from . import triton_ops

    softmax = WHOLE._replace(run=triton_ops.softmax)
    return Kernels(triton_ops.RMSNorm, triton_ops.Gated, triton_ops.rotate, softmax)


def milliseconds(run: Callable[[], object]) -> float:
    """Time a call on the current GPU: the best of several rounds."""
    best = float("inf")
    for _ in range(_ROUNDS + 1):  # the first compiles and warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_CALLS):
            run()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / _CALLS)
    return best


def choose(
    trials: Iterable[Trial],
    known: Collection[str] | None = None,
    *,
    offered: Callable[[], Kernels] = triton_kernels,
    timer: Timer = milliseconds,
) -> Choice:
    """Choose each operation of `trials` by itself; the others are torch's.

    known: the names that were chosen before, for a run that is resumed. They are not timed again, or a run would not go on as it
    was; they must still be right.
    """
    taken, kept, names, chosen = [], [], [], PLAIN
    for trial in trials:
        try:
            own, plain = (getattr(kernels, trial.name) for kernels in (offered(), PLAIN))
            if known is not None and trial.name not in known:
                ratio, said = 0.0, "as before"
            elif not agrees(trial, own, plain):
                ratio, said = 0.0, "does not agree"
            elif known is not None:
                ratio, said = WORTH, "as before"
            else:
                ratio = _times_faster(trial, own, plain, timer)
                said = f"{ratio:.1f}x"
        except Exception as error:  # compilers and drivers raise whatever they like
            ratio, said = 0.0, type(error).__name__
        if ratio >= WORTH:
            chosen = chosen._replace(**{trial.name: own})
            taken.append(f"{trial.name} {said}")
            names.append(trial.name)
        else:
            kept.append(f"{trial.name} ({said})")
    words = f"Triton: {', '.join(taken) or 'nothing'}" + (f"; torch: {', '.join(kept)}" if kept else "")
    return Choice(chosen, words, tuple(names))


def agrees(trial: Trial, own: Any, plain: Any) -> bool:
    """Whether results and gradients are right: of the form of torch's, and at most twice as far from those of a wider dtype."""
    inputs = trial.make()
    exact = trial.run(plain, [_widened(x) for x in inputs])
    expected = trial.run(plain, [x.clone() for x in inputs])
    found = trial.run(own, inputs)
    return all(map(_close, found, expected, exact))


def _close(found: Tensor, expected: Tensor, exact: Tensor) -> bool:
    """By the largest error, which one wrong number shows, and by the norm, which many little ones show. NaN is not close."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    own, plain = (found - exact).abs(), (expected - exact).abs()
    slack = _SLACK * min(torch.finfo(t).eps for t in (torch.float32, found.dtype)) * exact.abs()
    largest = own.max() <= 2 * plain.max() + slack.max()
    return bool(largest & (own.norm() <= 2 * plain.norm() + slack.norm()))


def _widened(x: Tensor) -> Tensor:
    """Give a copy in a wider dtype: fp32 for the halves, fp64 for fp32."""
    if not x.is_floating_point():
        return x.clone()
    return x.to(torch.float32 if x.element_size() < 4 else torch.float64, copy=True)


def _times_faster(trial: Trial, own: Any, plain: Any, timer: Timer) -> float:
    inputs = trial.make()
    own_time, plain_time = (timer(lambda kernel=kernel: trial.run(kernel, inputs)) for kernel in (own, plain))
    return plain_time / own_time
