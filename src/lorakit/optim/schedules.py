"""Learning-rate schedules: pure functions from the progress of the run to a multiplier between 0 and 1.

Steps count from 0. The warm-up rises as 1/w, 2/w, ..., 1 over its w steps, so that the very first step already moves;
after it the shape runs from 1 at the end of the warm-up to its last value at `total`, one step after the last one used.
A schedule without state is the same after any resume.
"""

import math
from collections.abc import Callable
from functools import partial

from ..core.errors import UsageError


def constant(progress: float) -> float:
    """Stay at 1."""
    return 1.0


def linear(progress: float) -> float:
    """Fall from 1 to 0 along a line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Fall from 1 to 0 along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, one cycle)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine, "linear": linear}


def schedule(name: str, total: int, warmup: float = 0.0) -> Callable[[float], float]:
    """Give the function step -> multiplier for a run of `total` steps; raises UsageError for an unknown name.

    `warmup` below 1 is a fraction of `total` (rounded up to whole steps), from 1 on a number of steps.
    """
    if name not in SCHEDULES:
        raise UsageError(f"unknown schedule {name!r}", fix=f"there are: {', '.join(sorted(SCHEDULES))}")
    if warmup < 0:
        raise UsageError(f"warmup is negative: {warmup}", fix="give a fraction below 1 or a number of steps")
    return partial(_multiplier, SCHEDULES[name], total, warmup_steps(total, warmup))


def warmup_steps(total: int, warmup: float) -> int:
    """Give the whole number of warm-up steps, at most `total`."""
    steps = math.ceil(round(warmup * total, 9)) if warmup < 1 else round(warmup)
    return min(steps, total)


def _multiplier(shape: Callable[[float], float], total: int, warm: int, step: float) -> float:
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(total - warm, 1)
    return shape(min(max(progress, 0.0), 1.0))
