"""Every closed form on the user's machine: the list of checks, and how they are run.

A check computes with its device and dtype what a formula says, and compares. What T1 to T54 are about is in `formulas.py`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checks import delivery, dynamics, lessons, measured, spectra, statistics
from .checks.outcome import Outcome, Run, Where


@dataclass(frozen=True)
class Check:
    """A named check; `double`: it is about float64 and means nothing in less."""

    id: str
    run: Run
    double: bool = False

    @property
    def what(self) -> str:
        """Give what is checked, the first line of the function's docstring without the name."""
        return (self.run.__doc__ or "").strip().splitlines()[0].partition(": ")[2]


CHECKS: tuple[Check, ...] = (
    Check("T1", spectra.fixture),
    Check("T1b", statistics.null_of_factors),
    Check("T2", spectra.truncation),
    Check("T3", spectra.small_singular_values, double=True),
    Check("T4", dynamics.work),
    Check("T5", dynamics.factor_gradients),
    Check("T6", dynamics.scale_identity),
    Check("T7", dynamics.component_sensitivities),
    Check("T8", dynamics.drift),
    Check("T9", dynamics.lora_plus),
    Check("T10", dynamics.hessian_spectrum),
    Check("T11", dynamics.saddle),
    Check("T12", dynamics.lanczos),
    Check("T13", dynamics.adam_threshold),
    Check("T14", dynamics.gain_ratio),
    Check("T15", dynamics.coupling),
    Check("T16", dynamics.random_projection),
    Check("T17", dynamics.first_step),
    Check("T18", statistics.thresholds),
    Check("T19", statistics.keep_cost),
    Check("T20", statistics.water_filling),
    Check("T21", statistics.gaussian_channel),
    Check("T22", spectra.rounding_closed_form),
    Check("T22b", spectra.rounding_measured),
    Check("T23", statistics.subspace_null),
    Check("T24", statistics.amplification),
    Check("T25", spectra.nuclear),
    Check("T26", statistics.probe_curve),
    Check("T27", statistics.rademacher),
    Check("T28", statistics.intruders),
    Check("T29", statistics.divergence),
    Check("T30", spectra.gauge_invariance),
    Check("T32", statistics.bounds),
    Check("T40", delivery.off_grid),
    Check("T41", delivery.best_in_output),
    Check("T42", delivery.shared_directions),
    Check("T33", measured.parabola),
    Check("T34", measured.row_intervals),
    Check("T35", measured.elasticity),
    Check("T36", dynamics.curve_exponent),
    Check("T50", lessons.rank),
    Check("T51", lessons.smooth),
    Check("T52", lessons.slow_mode),
    Check("T53", lessons.optimal_rank),
    Check("T54", lessons.heavy_tail),
)
"""T31, the loader, needs files and methods: it is in `analysis/loader_check.py`."""


@dataclass(frozen=True)
class Result:
    """What became of a check: `ok` is None where it does not apply to this dtype."""

    id: str
    what: str
    expected: tuple[float, ...]
    measured: tuple[float, ...]
    allowed: tuple[float, ...]
    ok: bool | None
    seconds: float
    error: str | None = None

    @property
    def worst(self) -> float:
        """Give the largest difference over what is allowed; 1 and below is agreement."""
        pairs = zip(self.expected, self.measured, self.allowed, strict=True)
        return max((abs(e - m) / a if a else float(e != m) * 1e9 for e, m, a in pairs), default=0.0)

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        return {**vars(self), "worst": self.worst}


def selftest(checks: Sequence[Check], device: str = "cpu", dtype: torch.dtype = torch.float64) -> Iterator[Result]:
    """Run checks one after the other. A check that raises has failed, with the error as its reason."""
    where = Where(torch.device(device), dtype)
    for check in checks:
        start = time.perf_counter()
        if check.double and dtype != torch.float64:
            yield Result(check.id, check.what, (), (), (), None, 0.0, f"about float64, not {dtype}")
            continue
        try:
            outcome = check.run(where)
        except Exception as error:  # whatever the user's device or library does wrong is what this is here to show
            message = f"{type(error).__name__}: {error}"
            yield Result(check.id, check.what, (), (), (), False, time.perf_counter() - start, message)
            continue
        yield judged(check, outcome, torch.finfo(dtype).eps, time.perf_counter() - start)


def judged(check: Check, outcome: Outcome, eps: float, seconds: float = 0.0) -> Result:
    """Compare what was expected with what was measured; NaN agrees with nothing."""
    allowed = tuple(outcome.allowed(eps))
    pairs = zip(outcome.expected, outcome.measured, allowed, strict=True)
    ok = all(abs(e - m) <= a for e, m, a in pairs)
    return Result(check.id, check.what, outcome.expected, outcome.measured, allowed, ok, seconds)
