"""What an adapter's matrices say about it, with and without its base model, and what does not need judgement to be wrong."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import LorakitError
from ..core.threads import threads
from ..interop.peft_config import MOVES_THE_BASE
from ..interop.read import TensorInfo
from ..theory import gauge, measures, nulls
from ..theory import spectrum as sp
from ..theory.number import Kind, Number
from .base_weights import BaseWeights
from .loaded import LoadedAdapter, LoadedModule, block_of, load_adapter
from .run_files import number, read_run

DENSE_SIDE = 1024
"""Changes without factors are decomposed up to this smaller side; above it the SVD of one matrix takes seconds."""
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Verdict:
    """Something that is certainly so, with what to do about it. There are no verdicts on anything else."""

    kind: str
    text: str
    modules: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(self.modules[:3]) + (f" and {len(self.modules) - 3} more" if len(self.modules) > 3 else "")
        return f"{self.text}: {shown}" if self.modules else self.text


@dataclass(frozen=True)
class Measured:
    """The numbers of one changed matrix."""

    module: LoadedModule
    numbers: Mapping[str, Number]
    spectrum: tuple[float, ...] = ()
    null_spectrum: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    dead_components: int = 0

    @property
    def dead(self) -> bool:
        """Whether the matrix is not changed at all."""
        return "frobenius" in self.numbers and self.numbers["frobenius"].value == 0

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        own = self.module
        return {
            "kind": own.kind,
            "shape": list(own.shape),
            "r": own.rank,
            "scale": own.scale if own.A is not None else None,
            "spectrum": list(self.spectrum),
            "numbers": {name: number.json() for name, number in self.numbers.items()},
            "notes": [*own.notes, *self.notes],
        }


@dataclass(frozen=True)
class Inspection:
    """All of it. `not_measured`: what is missing -> why."""

    modules: tuple[Measured, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    numbers: Mapping[str, Number] = field(default_factory=dict)
    not_measured: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        return {
            "modules": {m.module.path: m.json() for m in self.modules},
            "numbers": {name: number.json() for name, number in self.numbers.items()},
            "verdicts": [{"kind": v.kind, "text": v.text, "modules": list(v.modules)} for v in self.verdicts],
            "not_measured": dict(self.not_measured),
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def inspect_adapter(
    directory: Path,
    header: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    base: BaseWeights | None = None,
    *,
    intruders: bool = False,
) -> Inspection:
    """Measure an adapter directory. Nothing is raised for an adapter that cannot be read: the reason is in `not_measured`.

    header, config: of its files, as they stand there. base: adds what needs W; then `intruders` adds two SVDs a matrix.
    """
    start = time.perf_counter()
    unconverted = str(config.get("init_lora_weights")).lower()
    verdicts = []
    if unconverted.startswith(MOVES_THE_BASE):
        text = f"saved unconverted from the start {unconverted!r}: on the original base it means something else"
        verdicts.append(Verdict("unconverted", text))
    try:
        adapter = load_adapter(directory, base.layer if base else None)
        stored = _stored(header)
        # Factors are small: more than one thread gain nothing, and wait for each other on busy cores.
        with threads(torch.get_num_threads() if intruders else 1):
            modules = tuple(_measured(adapter, stored, base, intruders))
    except LorakitError as error:
        more = "; ".join(part for part in (error.why, error.fix) if part)
        why = f"{error.what} ({more})" if more else error.what
        return Inspection(verdicts=tuple(verdicts), not_measured={"everything": why})
    verdicts += [*_dead(modules), *_scales(adapter), *_storage(modules, stored)]
    return Inspection(
        modules,
        tuple(verdicts),
        _whole(adapter),
        _missing(modules, base is not None, intruders),
        (*adapter.notes, *_saved_in_full(adapter)),
        time.perf_counter() - start,
    )


def _measured(
    adapter: LoadedAdapter, stored: torch.dtype | None, base: BaseWeights | None, intruders: bool
) -> Iterator[Measured]:
    """Measure every module, in the adapter's order."""
    pairs: Iterable[tuple[LoadedModule, Tensor | None]] = base.stream(adapter) if base else ((m, None) for m in adapter)
    found = {module.path: _module(module, weight, stored, intruders) for module, weight in pairs}
    return (found[module.path] for module in adapter)


def _module(module: LoadedModule, weight: Tensor | None, stored: torch.dtype | None, intruders: bool) -> Measured:
    if not module.changes_matrix:
        return Measured(module, {}, notes=("changes no matrix",))
    if module.A is None or module.B is None:
        return _dense(module, weight, intruders)
    A, B, scale = module.A, module.B, module.scale
    empty = int(((A == 0).all(1) & (B == 0).all(0)).sum())
    if (
        module.needs_base and weight is not None
    ):  # DoRA: s·B·A is a part of the change, so only the facts of A and B are its own
        found = _dense(module, weight, intruders)
        return replace(found, numbers={**found.numbers, **measures.of_parametrisation(A, B)}, dead_components=empty)
    factored = sp.svd(A, B, scale) if weight is not None else None
    S = factored.S if factored else sp.singular_values(A, B, scale)
    numbers = measures.of_factors(A, B, scale, S)
    numbers |= measures.storage(A, B, S, stored or torch.bfloat16, stored=stored is not None)
    if weight is not None and factored is not None:
        numbers |= measures.with_base(factored, weight)
        numbers |= measures.intruding(factored, weight) if intruders else {}
    null = nulls.random_factors(*module.shape, len(A)).spectrum if len(A) and bool(S.any()) else ()
    notes = (
        ("norms and spectrum are of s·B·A, which is only a part of the change: --base",) if module.needs_base else ()
    )
    return Measured(module, numbers, tuple(S.tolist()), null, notes, empty)


def _dense(module: LoadedModule, weight: Tensor | None, intruders: bool) -> Measured:
    """Measure a change that is no product of factors: its norm always, its spectrum where the SVD is quick."""
    if module.needs_base and weight is None:
        return Measured(module, {}, notes=("the change depends on the base weight: --base",))
    delta = module.delta(weight)
    size = float(torch.linalg.matrix_norm(delta))
    if min(module.shape) > DENSE_SIDE:
        numbers = {"frobenius": Number(size, Kind.EXACT, "frobenius")}
        numbers |= _relative(delta, weight) if weight is not None else {}
        return Measured(module, numbers, notes=(f"no spectrum: not s·B·A, and larger than {DENSE_SIDE}",))
    factored = sp.dense_svd(delta)
    numbers = measures.of_spectrum(factored.S, *module.shape, 0)
    if weight is not None:
        numbers |= measures.with_base(factored, weight)
        numbers |= measures.intruding(factored, weight) if intruders else {}
    return Measured(module, numbers, tuple(factored.S.tolist()))


def _relative(delta: Tensor, weight: Tensor) -> dict[str, Number]:
    whole = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    size = float(torch.linalg.matrix_norm(delta))
    return {"relative_norm": Number(size / whole if whole else math.nan, Kind.EXACT, "relative_norm")}


# --- what is certain ----------------------------------------------------------------------------------------------------


def _dead(modules: Iterable[Measured]) -> Iterator[Verdict]:
    modules = list(modules)
    dead = tuple(m.module.path for m in modules if m.dead)
    if dead:
        text = f"{len(dead)} of {len(modules)} matrices are not changed at all: untrained, or they got no gradient"
        yield Verdict("dead module", text, dead)
    partly = [m for m in modules if m.dead_components and not m.dead]
    if partly:
        text = "components where the row of A and the column of B are both zero never learn again"
        count = sum(m.dead_components for m in partly)
        yield Verdict("dead component", f"{count} {text}", tuple(m.module.path for m in partly))


def _scales(adapter: LoadedAdapter) -> Iterator[Verdict]:
    """Compare what the two configuration files say of the scale; of composed adapters they differ for good reason."""
    side, own = adapter.side.get("method", {}), vars(adapter.settings)
    if adapter.side.get("parts"):
        return
    for key in ("r", "alpha", "rank_stabilized"):
        if side.get(key) is not None and key in own and side[key] != own[key]:
            text = f"lorakit.json says {key} = {side[key]}, adapter_config.json {own[key]}, which is what is used"
            yield Verdict("scale", text)


def _storage(modules: Iterable[Measured], stored: torch.dtype | None) -> Iterator[Verdict]:
    if stored is None:
        return
    name = str(stored).removeprefix("torch.")
    below = [m for m in modules if f"rank_above_{name}" in m.numbers and not m.dead]
    below = [m for m in below if m.numbers[f"rank_above_{name}"].value < m.numbers["numerical_rank"].value]
    if below:
        text = f"stored in {name}: in {len(below)} matrices the smallest singular values are below its rounding"
        yield Verdict("storage precision", text, tuple(m.module.path for m in below))


# --- the rest -----------------------------------------------------------------------------------------------------------


def _stored(header: Mapping[str, TensorInfo]) -> torch.dtype | None:
    """Give the dtype of the factors in the file if all are in one of 16 bits."""
    kinds = {info.dtype for info in header.values() if len(info.shape) > 1}
    return HALVES.get(kinds.pop()) if len(kinds) == 1 else None


def _whole(adapter: LoadedAdapter) -> dict[str, Number]:
    """Give what concerns the adapter as a whole: what weight decay left, if the run that made it is around."""
    run = adapter.directory.parent
    if not (run / "metrics.jsonl").is_file() or not (run / "config.yaml").is_file():
        return {}
    found = read_run(run, run.name)
    decay, lrs = number(found.config.get("optim.weight_decay")), found.points("lr")[1]
    if decay is None or not lrs:
        return {}
    left = gauge.decay_survival(lrs, decay)
    inputs = {"weight_decay": decay, "steps": len(lrs), "sum_lr": sum(lrs)}
    return {"decay_survival": Number(left, Kind.EXACT, "decay_survival", 1.0, inputs=inputs)}


def _missing(modules: Iterable[Measured], base: bool, intruders: bool) -> dict[str, str]:
    alike: dict[str, list[str]] = {}
    for m in modules:
        if m.notes:
            alike.setdefault("; ".join(m.notes), []).append(m.module.path)
    missing = {paths[0] + (f" and {len(paths) - 1} more" if paths[1:] else ""): why for why, paths in alike.items()}
    if not base:
        missing["relative norm, amplification, dominance"] = "they need the base weights: --base MODEL"
    if not intruders:
        missing["intruder dimensions"] = "two SVDs of each base matrix, minutes: --base MODEL --intruders"
    missing["effect on the loss"] = "no data is read here"
    return missing


def _saved_in_full(adapter: LoadedAdapter) -> Iterator[str]:
    if adapter.saved:
        yield f"trained in full, not measured here: {', '.join(adapter.saved)}"


def by_name(modules: Iterable[Measured]) -> dict[str, list[Measured]]:
    """Give the modules by their name inside the block: one row of a table or a picture."""
    found: dict[str, list[Measured]] = {}
    for measured in modules:
        found.setdefault(block_of(measured.module.path)[1], []).append(measured)
    return found
