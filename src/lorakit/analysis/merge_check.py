"""What is left of an adapter once it is merged into weights of few bits: predicted in closed form, and measured, in one pass.

    left = round(W + ΔW) - round(W)
    retained <left, ΔW> / ||ΔW||^2        noise ||left - ΔW|| / ||ΔW||
    unmerge damage ||round(round(W + ΔW) - ΔW) - round(W)|| / ||ΔW||

W as the base stores it, read one matrix at a time. The closed form (`theory/rounding.py`) takes the entries of ΔW as normal; that
of W that already lies on the grid and the rest of it are predicted each by its own. 4 and 8 bits have no closed form.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import UsageError
from ..theory import rounding
from ..theory.number import Kind, Number
from ..theory.rounding import Rounding
from .base_weights import BaseWeights
from .loaded import LoadedAdapter, LoadedModule
from .stored import FLOATS, Grid, grid, is_quantized

RETAINED, NOISE = 0.98, 0.2
"""What an update keeps at least, and its noise at most, before merging it counts as damage."""
AT_ONCE = 1 << 20  # entries of a matrix in double precision


@dataclass(frozen=True)
class ModuleCheck:
    """One module: `energy` is ||ΔW||_F^2, 0 where nothing is changed; `numbers` are those of the file's heading."""

    module: LoadedModule
    energy: float
    numbers: Mapping[str, Number]
    elsewhere: Mapping[str, Rounding]
    """The prediction for each float dtype."""
    overflowed: int = 0

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        own = self.module
        numbers = {name: number.json() for name, number in self.numbers.items()}
        return {"path": own.path, "shape": list(own.shape), "overflowed": self.overflowed, "numbers": numbers}


@dataclass(frozen=True)
class MergeCheck:
    """All modules, worst first, and the whole: every mean weighted by the energy of the modules."""

    dtype: str
    modules: tuple[ModuleCheck, ...]
    numbers: Mapping[str, Number]
    elsewhere: Mapping[str, Number]
    """Predicted noise of the whole in every float dtype."""
    least_retained: float
    most_noise: float
    notes: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the whole keeps enough with little enough noise; what is NaN is not ok."""
        return self.passes(self.numbers)

    def passes(self, numbers: Mapping[str, Number]) -> bool:
        """Whether these numbers are within the limits."""
        return numbers["retained"].value >= self.least_retained and numbers["noise"].value <= self.most_noise

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        return {
            "dtype": self.dtype,
            "ok": self.ok,
            "threshold": {"retained": self.least_retained, "noise": self.most_noise},
            "numbers": {name: number.json() for name, number in self.numbers.items()},
            "predicted_noise_elsewhere": {name: number.json() for name, number in self.elsewhere.items()},
            "modules": [module.json() for module in self.modules],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def merge_check(
    adapter: LoadedAdapter, base: BaseWeights, dtype: str, *, retained: float = RETAINED, noise: float = NOISE
) -> MergeCheck:
    """Check merging into `dtype` (a name of `stored.find_format`). Raises UsageError for an adapter that cannot be merged.

    An adapter that was trained on a quantized base is merged into what that base holds.
    """
    start = time.perf_counter()
    left_out = [m for m in adapter if not m.changes_matrix]
    whole = [m for m in adapter if m.changes_matrix]
    if not whole or any(not m.adapter.mergeable() for m in left_out):
        raise UsageError(
            f"a {adapter.method} adapter cannot be merged",
            why="it is no change of a weight matrix" if left_out else "it changes no layer",
            fix="keep it beside the base model",
        )
    trained_on = (adapter.side.get("base") or {}).get("quantize")
    checked = [_module(m, W, dtype, trained_on) for m, W in base.stream(whole)]
    modules = sorted(checked, key=_badness, reverse=True)
    notes = [*adapter.notes, *_notes(modules, adapter, left_out, dtype)]
    changed = [m for m in modules if m.energy > 0]
    return MergeCheck(
        dtype,
        tuple(modules),
        _pooled(changed),
        {name: _predicted(_mean([(m.elsewhere[name], m.energy) for m in changed]).error, name) for name in FLOATS},
        retained,
        noise,
        tuple(notes),
        time.perf_counter() - start,
    )


class _Sums(NamedTuple):
    """Sums over entries, from which every number follows."""

    base: float = 0.0
    energy: float = 0.0
    along: float = 0.0
    error: float = 0.0
    still: float = 0.0
    damage: float = 0.0
    lost: int = 0
    """Entries that are no longer finite."""

    def plus(self, other: "_Sums") -> "_Sums":
        return _Sums(*(a + b for a, b in zip(self, other, strict=True)))


def _module(module: LoadedModule, weight: Tensor, dtype: str, trained_on: str | None) -> ModuleCheck:
    kept = dtype if dtype in FLOATS or is_quantized(module) else _own_dtype(weight)
    if trained_on is not None and is_quantized(module):
        weight = grid(trained_on)(weight.float())
    sums, grids = _Sums(), {name: _Histogram(kind) for name, kind in FLOATS.items()}
    for W, delta in _blocks(module, weight, whole=kept not in FLOATS):
        sums = sums.plus(_measure(W, delta, grid(kept)))
        for histogram in grids.values():
            histogram.add(W)
    size = math.prod(module.shape)
    rms = math.sqrt(sums.energy / size)
    elsewhere = {name: histogram.predict(rms) for name, histogram in grids.items()} if sums.energy else {}
    return ModuleCheck(module, sums.energy, _numbers(sums, size, kept, elsewhere.get(kept)), elsewhere, sums.lost)


def _blocks(module: LoadedModule, weight: Tensor, *, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of (W, ΔW) in double precision: few at a time, or all where the format looks at the whole matrix."""
    out, inner = module.shape
    rows = out if whole else max(1, AT_ONCE // inner)
    dense = module.delta(weight) if module.A is None or module.B is None or module.needs_base else None
    for first in range(0, out, rows):
        part = slice(first, first + rows)
        if dense is None and module.A is not None and module.B is not None:
            delta = module.scale * (module.B[part].double() @ module.A.double())
        else:
            delta = dense[part] if dense is not None else torch.zeros(0)
        yield weight[part].double(), delta


def _measure(W: Tensor, delta: Tensor, rounded: Grid) -> _Sums:
    before, after = rounded(W), rounded(W + delta)
    left = after - before
    return _Sums(
        float(W.square().sum()),
        float(delta.square().sum()),
        float((left * delta).sum()),
        float((left - delta).square().sum()),
        float((left == 0).sum()),
        float((rounded(after - delta) - before).square().sum()),
        int((~after.isfinite()).sum()),
    )


class _Histogram:
    """Spacings of a float dtype at the entries of W that lie on its grid, and at those that do not."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.parts: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}

    def add(self, W: Tensor) -> None:
        """Count the entries of a block."""
        on = W.to(self.dtype) == W
        entire = bool(on.all())  # the usual case, and picking entries takes longer than counting them
        for where in (True, False):
            entries = W if where and entire else W[on == where]
            if entries.numel():
                ulps, shares = rounding.ulp_histogram(entries, self.dtype)
                self.parts[where].append((ulps, shares * entries.numel()))
            if entire:
                break

    def predict(self, rms: float) -> Rounding:
        """Give the closed form for a change of this root mean square in every entry."""
        found = []
        for where, predict in ((True, rounding.predict), (False, rounding.predict_off_grid)):
            if self.parts[where]:
                ulps, counts = (torch.cat(column) for column in zip(*self.parts[where], strict=True))
                found.append((predict(rms, ulps, counts / counts.sum()), float(counts.sum())))
        return _mean(found)


def _numbers(sums: _Sums, size: int, dtype: str, predicted: Rounding | None) -> dict[str, Number]:
    energy = sums.energy or math.nan

    def measured(value: float, formula: str = "rounding_measured") -> Number:
        return Number(value, Kind.EXACT, formula, inputs={"dtype": dtype})

    numbers = {
        "relative_norm": Number(
            math.sqrt(sums.energy / sums.base) if sums.base else math.nan, Kind.EXACT, "relative_norm"
        ),
        "retained": measured(sums.along / energy),
        "noise": measured(math.sqrt(sums.error / energy)),
        "unchanged": measured(sums.still / size),
        "unmerge_damage": measured(math.sqrt(sums.damage / energy), "unmerge_damage"),
    }
    if predicted is not None:
        numbers["predicted_retained"] = _predicted(predicted.retained, dtype)
        numbers["predicted_noise"] = _predicted(predicted.error, dtype)
        numbers["predicted_unchanged"] = _predicted(predicted.unchanged, dtype)
    return numbers


def _predicted(value: float, dtype: str) -> Number:
    return Number(value, Kind.ESTIMATE, "rounding_closed_form", inputs={"dtype": dtype})


def _pooled(modules: Iterable[ModuleCheck]) -> dict[str, Number]:
    """Put modules together by their energy; noise and damage as root mean squares. NaN for no modules."""
    modules = list(modules)
    total = sum(m.energy for m in modules)
    found: dict[str, Number] = {}
    for name, squared in (
        ("retained", False),
        ("noise", True),
        ("unmerge_damage", True),
        ("predicted_retained", False),
        ("predicted_noise", True),
    ):
        having = [(m.numbers[name], m.energy) for m in modules if name in m.numbers]
        if name.startswith("predicted") and (not having or len(having) < len(modules)):
            continue
        mean = sum(n.value ** (1 + squared) * e for n, e in having) / total if total else math.nan
        like = having[0][0] if having else Number(mean, Kind.EXACT, "rounding_measured")
        found[name] = Number(math.sqrt(mean) if squared else mean, like.kind, like.formula, inputs=like.inputs)
    base = sum(m.energy / m.numbers["relative_norm"].value ** 2 for m in modules)
    found["relative_norm"] = Number(math.sqrt(total / base) if base else math.nan, Kind.EXACT, "relative_norm")
    return found


def _mean(parts: list[tuple[Rounding, float]]) -> Rounding:
    total = sum(weight for _, weight in parts)
    if not total:
        return Rounding(math.nan, math.nan, math.nan)
    retained, squared, still = (
        sum(value(r) * weight for r, weight in parts) / total
        for value in (lambda r: r.retained, lambda r: r.error**2, lambda r: r.unchanged)
    )
    return Rounding(retained, math.sqrt(squared), still)


def _badness(module: ModuleCheck) -> float:
    noise = module.numbers["noise"].value
    return -1.0 if module.energy == 0 else math.inf if math.isnan(noise) else noise


def _own_dtype(weight: Tensor) -> str:
    return next((name for name, kind in FLOATS.items() if kind == weight.dtype), "fp32")


def _notes(
    modules: Iterable[ModuleCheck], adapter: LoadedAdapter, left_out: list[LoadedModule], dtype: str
) -> Iterator[str]:
    still = [m.module.path for m in modules if m.energy == 0]
    if still:
        yield f"{len(still)} modules are not changed by the adapter: {', '.join(still[:3])}"
    if left_out:
        yield f"{len(left_out)} modules change only a bias, which is not measured here"
    if adapter.saved:
        yield f"trained in full, rounded like any weight and not measured here: {', '.join(adapter.saved)}"
    plain = [m.module.path for m in modules if dtype not in FLOATS and not is_quantized(m.module)]
    if plain:
        yield f"not stored in {dtype} but as in the base: {', '.join(plain[:3])}"
    over = sum(m.overflowed for m in modules)
    if over:
        yield f"{over} weights overflow in {dtype}"
