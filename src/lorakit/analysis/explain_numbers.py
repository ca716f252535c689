"""The user's own numbers for a topic, from an adapter's files, its base's weights and the records of a run.

Everything here is a `Number`. Of many modules it is the median, with the modules where it is lowest and highest in `inputs`.
What cannot be had is said, with what to give for it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import FileError
from ..interop.adapter_directory import CONFIG, WEIGHTS
from ..interop.read import read_header, read_json, regular_file
from ..theory import coding, flops, gauge, gradients, rounding, smoothness, tails
from ..theory import spectrum as sp
from ..theory.number import Kind, Number
from .base_weights import BaseWeights
from .explain import LABELS
from .inspection import Inspection, inspect_adapter
from .loaded import LoadedModule, load_adapter
from .run_files import Run, number, read_run

SHARE = 0.01
"""Squared error, relative to that of the change, at which its bits are counted."""


class Seen(NamedTuple):
    """One factored change; `weight` where the base is given."""

    module: LoadedModule
    A: Tensor
    B: Tensor
    scale: float
    S: Tensor
    weight: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d, k, r)."""
        return (*self.module.shape, len(self.A))


class Field(NamedTuple):
    """A number that a run records: its name there, kind, formula, and what it is where there is nothing to see."""

    name: str
    kind: Kind
    formula: str
    null: float | None = None
    error: str | None = None
    """Record of its standard error."""


FROM_FILES = (
    "frobenius spectral nuclear stable_rank effective_rank participation energy_rank_90 energy_rank_99 numerical_rank "
    "condition parameters degrees_of_freedom break_even_rank imbalance norm_A norm_B storage_error rank_above"
).split()
"""Of `lorakit inspect`."""
FROM_BASE = "relative_norm amplification dominance intruders_attributable intruders_smeared".split()
"""Of `lorakit inspect --base`."""


def _compression(seen: Seen) -> Number:
    return Number(flops.compression(*seen.shape), Kind.EXACT, "compression_ratio")


def _work(seen: Seen) -> Number:
    return Number(flops.training_ratio(*seen.shape), Kind.EXACT, "training_flops")


def _half(seen: Seen) -> Number:
    q, whole = max(len(seen.S) // 2, 1), sp.frobenius(seen.S)
    left = sp.truncation_error(seen.S, q).frobenius / whole if whole else math.nan
    return Number(left, Kind.EXACT, "truncation", inputs={"rank": q})


def _gap(seen: Seen) -> Number:
    return Number(gauge.nuclear_gap(seen.A, seen.B), Kind.PARAMETRISATION, "nuclear_gap", 1.0)


def _bits(seen: Seen) -> Number:
    energy = seen.S.square()
    if not bool(energy.any()):
        return Number(math.nan, Kind.EXACT, "water_filling")
    found = coding.water_filling(energy, SHARE * float(energy.sum()))
    return Number(found.rate, Kind.EXACT, "water_filling", inputs={"distortion": SHARE})


def _tail(seen: Seen) -> Number:
    values = seen.S[seen.S > 0].square()
    found = tails.exponent(values) if len(values) > 1 else tails.Tail(math.nan, math.nan, len(values))
    low, high = found.alpha - 1.96 * found.se, found.alpha + 1.96 * found.se
    return Number(found.alpha, Kind.ESTIMATE, "tail_exponent", interval=(low, high), n=found.n)


def _gauge(seen: Seen) -> Number:
    """Change the factors by a random R and compare the singular values: rounding, or the theory is wrong."""
    r = len(seen.A)
    R = torch.randn(r, r, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = sp.singular_values(*gauge.transform(seen.A, seen.B, R), seen.scale)
    apart = float((other - seen.S).abs().max()) / float(seen.S[0]) if bool(seen.S.any()) else math.nan
    return Number(apart, Kind.EXACT, "singular_values", 0.0)


def _merged(dtype: torch.dtype, what: str) -> Callable[[Seen], Number]:
    def measure(seen: Seen) -> Number:
        assert seen.weight is not None
        delta, W = seen.scale * (seen.B.double() @ seen.A.double()), seen.weight.double()
        found = rounding.compare((W + delta).to(dtype).double() - W.to(dtype).double(), delta)
        return Number(found._asdict()[what], Kind.EXACT, "rounding_measured", inputs={"dtype": str(dtype)[6:]})

    return measure


def _spectral_ratio(seen: Seen) -> Number:
    assert seen.weight is not None
    W = seen.weight.to(torch.promote_types(seen.weight.dtype, torch.float32))
    before = smoothness.spectral_norm(W)
    after = smoothness.spectral_norm(W + (seen.scale * (seen.B @ seen.A)).to(W.dtype))
    return Number(after / before if before else math.nan, Kind.EXACT, "spectral_ratio", 1.0)


OF_FACTORS: Mapping[str, Callable[[Seen], Number]] = {
    "compression_ratio": _compression,
    "training_ratio": _work,
    "half_rank_error": _half,
    "nuclear_gap": _gap,
    "bits_at_1_percent": _bits,
    "tail_exponent": _tail,
    "gauge_difference": _gauge,
}
OF_BOTH: Mapping[str, Callable[[Seen], Number]] = {
    "retained_bfloat16": _merged(torch.bfloat16, "retained"),
    "error_bfloat16": _merged(torch.bfloat16, "error"),
    "error_float16": _merged(torch.float16, "error"),
    "spectral_ratio": _spectral_ratio,
}
RECORDED: Mapping[str, Field] = {
    "gain_ratio": Field("gain_ratio", Kind.ESTIMATE, "gain_ratio", 1.0),
    "train_slope": Field("train_slope", Kind.EXACT, "scale_derivative", 0.0),
    "slope_mismatch": Field("slope_mismatch", Kind.EXACT, "scale_derivative", 0.0),
    "eval_slope": Field("eval_slope", Kind.ESTIMATE, "scale_derivative", 0.0, "eval_slope_se"),
    "curve_exponent": Field("curve_exponent", Kind.ESTIMATE, "curve_exponent", 0.0),
    "noise_scale": Field("noise_scale", Kind.ESTIMATE, "noise_scale"),
    "A_movement": Field("A_movement", Kind.PARAMETRISATION, "movement", 0.0),
    "decay_survival": Field("decay_survival", Kind.EXACT, "decay_survival", 1.0),
    "bits_per_parameter": Field("bits_per_parameter", Kind.ESTIMATE, "excess_description_length", 0.0),
    "relative_update": Field("rho_step", Kind.EXACT, "relative_update"),
}
"""What a run with `train.diagnose` writes into `metrics.jsonl`."""
OF_RUN = ("first_update", "information_bound", "tokens_per_parameter")
"""From the configuration of a run, its counts and its adapter."""


@dataclass(frozen=True)
class Own:
    """The user's numbers, and for those that are not there what to give or why they cannot be had."""

    numbers: Mapping[str, Number] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


def names() -> set[str]:
    """Give every name that a topic may ask for."""
    return {*FROM_FILES, *FROM_BASE, *OF_FACTORS, *OF_BOTH, *RECORDED, *OF_RUN}


def own_numbers(
    wanted: Iterable[str], adapter: Path | None = None, base: BaseWeights | None = None, run: Path | None = None
) -> Own:
    """Measure what was asked for. adapter: its directory; a run brings its own. FileError for a directory that is none."""
    wanted = list(wanted)
    if run is not None and not (run / "metrics.jsonl").is_file():
        raise FileError(
            f"{run} is not a run directory", why="it has no metrics.jsonl", fix="the `output` of a training run"
        )
    if adapter is None and run is not None and (run / "adapter" / CONFIG).is_file():
        adapter = run / "adapter"
    numbers: dict[str, Number] = {}
    missing = {name: _what_to_give(name, adapter is None, base is None, run is None) for name in wanted}
    if adapter is not None:
        found, why = _of_adapter(wanted, adapter, base)
        numbers |= found
        missing |= {name: why for name in wanted if why and name not in RECORDED}
    if run is not None:
        numbers |= _of_run([name for name in wanted if name in RECORDED or name in OF_RUN], run, adapter)
    numbers = {name: numbers[name] for name in wanted if name in numbers and math.isfinite(numbers[name].value)}
    return Own(numbers, {name: why for name, why in missing.items() if name not in numbers})


def _what_to_give(name: str, no_adapter: bool, no_base: bool, no_run: bool) -> str:
    if name in RECORDED:
        return "--run DIR" if no_run else "train.diagnose: true"
    if name in OF_RUN:
        return "--run DIR" if no_run else LABELS["en"]["finished run"]
    if no_adapter:
        return "--adapter DIR --base MODEL" if name in FROM_BASE or name in OF_BOTH else "--adapter DIR"
    if no_base and (name in FROM_BASE or name in OF_BOTH):
        return "--base MODEL"
    return LABELS["en"]["factors"]


# --- an adapter ---------------------------------------------------------------------------------------------------------


def _of_adapter(wanted: list[str], directory: Path, base: BaseWeights | None) -> tuple[dict[str, Number], str | None]:
    """Give the medians over the modules, and the reason if the adapter cannot be read."""
    header, config = read_header(regular_file(directory, WEIGHTS)), read_json(regular_file(directory, CONFIG))
    intruders = base is not None and any(name.startswith("intruders") for name in wanted)
    found: dict[str, list[tuple[str, Number]]] = {}
    if any(name in FROM_FILES or name in FROM_BASE for name in wanted):
        seen = inspect_adapter(directory, header, config, base, intruders=intruders)
        if "everything" in seen.not_measured:
            return {}, seen.not_measured["everything"]
        found |= _inspected(wanted, seen)
    extra = {name: OF_FACTORS[name] for name in wanted if name in OF_FACTORS}
    extra |= {name: OF_BOTH[name] for name in wanted if name in OF_BOTH and base is not None}
    if extra:
        loaded = load_adapter(directory, base.layer if base else None)
        needs_weight = base is not None and any(name in OF_BOTH for name in extra)
        pairs = base.stream(loaded) if base is not None and needs_weight else ((m, None) for m in loaded)
        for module, weight in pairs:
            if module.A is None or module.B is None or module.needs_base:
                continue
            S = sp.singular_values(module.A, module.B, module.scale)
            one = Seen(module, module.A, module.B, module.scale, S, weight)
            for name, measure in extra.items():
                found.setdefault(name, []).append((module.path, measure(one)))
    return {name: middle(values) for name, values in found.items() if values}, None


def _inspected(wanted: list[str], seen: Inspection) -> dict[str, list[tuple[str, Number]]]:
    """Sort the numbers of an inspection by name; those named by the dtype of the file lose it."""
    found: dict[str, list[tuple[str, Number]]] = {}
    for measured in seen.modules:
        for full, one in measured.numbers.items():
            name = next((n for n in ("storage_error", "rank_above") if full.startswith(n)), full)
            if name in wanted and math.isfinite(one.value):
                found.setdefault(name, []).append((measured.module.path, one))
    return found


def middle(values: list[tuple[str, Number]]) -> Number:
    """Give the module in the middle, with its null and interval; the others are in `inputs`. Not finite ones do not count."""
    kept = sorted((pair for pair in values if math.isfinite(pair[1].value)), key=lambda pair: pair[1].value)
    if not kept:
        return values[0][1]
    (path, chosen), lowest, highest = kept[(len(kept) - 1) // 2], kept[0], kept[-1]
    inputs: dict[str, Any] = {**chosen.inputs, "modules": len(kept), "module": path}
    inputs |= {"lowest": [lowest[0], lowest[1].value], "highest": [highest[0], highest[1].value]}
    return Number(chosen.value, chosen.kind, chosen.formula, chosen.null, chosen.interval, chosen.n, inputs)


# --- a run --------------------------------------------------------------------------------------------------------------


def _of_run(wanted: list[str], directory: Path, adapter: Path | None) -> dict[str, Number]:
    run = read_run(directory, directory.name)
    found = {name: one for name in wanted if name in RECORDED and (one := recorded(RECORDED[name], run)) is not None}
    if any(name in OF_RUN for name in wanted) and adapter is not None:
        modules = [m for m in load_adapter(adapter) if m.A is not None and m.B is not None]
        found |= _planned(run, modules)
    return found


def recorded(what: Field, run: Run) -> Number | None:
    """Give the last value of a record, with its interval where its standard error is recorded too."""
    steps, values = run.points(what.name)
    if not values:
        steps, values = run.evaluated(what.name)
    if not values:
        return None
    inputs = {"step": int(steps[-1]), "looks": len(values), "smallest": min(values), "largest": max(values)}
    interval, errors = None, run.evaluated(what.error)[1] if what.error else []
    if errors:
        interval = (values[-1] - 1.96 * errors[-1], values[-1] + 1.96 * errors[-1])
    return Number(values[-1], what.kind, what.formula, what.null, interval, inputs=inputs)


def _planned(run: Run, modules: list[LoadedModule]) -> dict[str, Number]:
    """Give what the configuration and the counts of a run say: the first step, and the bound that says nothing."""
    found: dict[str, Number] = {}
    settings, (steps, rates) = run.config, run.points("lr")
    usual = settings.get("method.init", "kaiming") == "kaiming" and settings.get("optim.name", "adamw") == "adamw"
    if usual and modules and steps and steps[0] == 1:  # the rate of step 1, which warmup makes smaller
        rate = rates[0] * (number(settings.get("optim.b_ratio")) or 1.0)
        each = [(m.path, gradients.adam_first_update(m.shape[0], m.rank or 0, m.scale, rate)) for m in modules]
        found["first_update"] = middle(
            [(path, Number(size, Kind.ESTIMATE, "first_update", inputs={"lr": rate})) for path, size in each]
        )
    tokens = run.last("trained_tokens")
    count = sum(flops.parameters(*m.shape, m.rank or 0) for m in modules)
    if tokens and count:
        bound = coding.information_bound(count, 32, int(tokens))
        inputs = {"parameters": count, "bits": 32, "n": int(tokens), "vacuity": coding.vacuity(bound)}
        found["information_bound"] = Number(bound, Kind.BOUND, "information_bound", inputs=inputs)
        found["tokens_per_parameter"] = Number(tokens / count, Kind.HEURISTIC, "tokens_per_parameter")
    return found
