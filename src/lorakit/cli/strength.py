"""`lorakit strength`: how strong an adapter should be, what the base model loses by it, and which modules it is about."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .generate import BASE, DTYPE
from .output import json_result, notices, result, style, table

if TYPE_CHECKING:
    from ..analysis.strength import Strength, Sweep
    from ..theory.judgement import Judgement

MODULES = 8  # rows of the table of modules


def strength(
    adapter: str = typer.Argument(..., metavar="ADAPTER", help="Adapter or run directory.", show_default=False),
    val: str = typer.Option(..., "--val", "--data", "-d", help="Held-out rows of the task: a file or a directory."),
    retain: str = typer.Option(None, "--retain", help="Rows of what the base model should still do."),
    output: Path = typer.Option(None, "--output", "-o", help="Write the adapter at its best strength here."),
    gamma: float = typer.Option(None, "--gamma", help="Write it at this strength instead."),
    rows: int = typer.Option(64, "--rows", min=0, help="Rows to measure on, evenly spaced; 0 for all."),
    format: str = typer.Option(None, "--format", help="Form of the rows; found by looking when absent."),
    base: str = BASE,
    dtype: str = DTYPE,
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure an adapter at several strengths on held-out rows.

    Loss and KL to the base model at each strength, the slope of the loss by the strength of each module (exact), and what they
    mean: overfitted, undertrained, forgetting. With --output the same adapter is written at its best strength: its alpha is
    edited, its tensors are not.
    """
    from ..analysis.strength import measure
    from ..analysis.strength_judgements import judged
    from .held_out import held_out
    from .opened import open_model, require_adapter

    found = require_adapter(adapter)
    opened = open_model(str(found), base=base, dtype=dtype, classify=True)
    task, dataset = held_out(opened, val, format, rows)
    keep = None if retain is None else held_out(opened, retain, None, rows)[0]
    notices(dataset.stats.notices)
    measured = judged(measure(opened.model, "default", task, keep))
    written = None if output is None else write(found, output, measured, gamma, opened.path)
    if json:
        json_result({**as_dict(measured), "written": written})
    else:
        show(measured, written)


def write(found: Path, output: Path, measured: "Strength", gamma: float | None, base: Path) -> dict[str, Any]:
    """Write the adapter at a strength, and say which. `base`: the base model's directory."""
    from ..analysis.base_weights import BaseWeights
    from ..analysis.rescale import rescale

    chosen = round(measured.task.best().value, 3) if gamma is None else gamma
    return {"adapter": str(rescale(found, output, chosen, BaseWeights(base).layer)), "strength": chosen}


def as_dict(found: "Strength") -> dict[str, Any]:
    """Give everything for machines."""
    return {
        "rows": len(found.task.weights),
        "best_strength": found.task.best().json(),
        "slope": found.slope.json(),
        "elasticity": found.elasticity().json(),
        "mismatch": None if math.isnan(found.mismatch) else found.mismatch,
        "task": _sweep(found.task),
        "retain": None if found.retain is None else _sweep(found.retain),
        "modules": {path: slope.json() for path, slope in found.slopes.items()},
        "trained_in_full": list(found.kept),
        "judgements": [judgement.json() for judgement in found.judgements],
        "not_measured": dict(found.not_measured),
    }


def _sweep(found: "Sweep") -> dict[str, Any]:
    kls = found.kls()
    return {
        "base_loss": None if found.base is None else found.mean(found.base),
        "loss": {f"{g:g}": number.json() for g, number in found.losses().items()},
        "kl": None if kls is None else {f"{g:g}": number.json() for g, number in kls.items()},
        "rows": len(found.weights),
        "seconds": found.seconds,
    }


def show(found: "Strength", written: dict[str, Any] | None) -> None:
    """Print it for people."""
    result(table(_rows(found)))
    slope = found.slope
    low, high = slope.interval or (slope.value, slope.value)
    result(f"\ndL/dγ at γ = 1  {slope.value:+.4g} (95 %: {low:+.4g} to {high:+.4g}), exact on these rows")
    for name, sweep in (("task", found.task), ("retain", found.retain)):
        kls = None if sweep is None else sweep.kls()
        if kls is not None:
            low, high = kls[1.0].interval or (kls[1.0].value,) * 2
            result(
                f"KL(base || adapted) on the {name} rows  {kls[1.0].value:.4g} (95 %: {low:.4g} to {high:.4g}) nats a token"
            )
    if not math.isnan(found.mismatch):
        result(f"<A, dA> and <B, dB> differ by {found.mismatch:.1e} of their size: the backward pass is right")
    if found.kept:
        result(f"trained in full, the same at every strength: {', '.join(found.kept)}")
    result("\n" + table(list(_modules(found))))
    result("")
    for judgement in found.judgements:
        tell(judgement)
    if found.retain is None:
        result("retention: not measured (--retain R)")
    for what, why in found.not_measured.items():
        if what != "retention":
            result(f"{what}: not measured, {why}")
    if written is not None:
        result(f"\n{written['adapter']}: the adapter at strength {written['strength']:g}, its alpha edited")


def _rows(found: "Strength") -> list[tuple[object, ...]]:
    """Give the sweep as rows: strength, loss, its interval, KL; the same of the rows to retain beside them."""
    sweeps = [found.task] if found.retain is None else [found.task, found.retain]
    names = ["task"] if found.retain is None else ["task", "retain"]
    heading: list[object] = ["γ"]
    for name, sweep in zip(names, sweeps, strict=True):
        heading += [f"{name} loss", "95 %"] + (["KL to base"] if sweep.kl is not None else [])
    lines: list[tuple[object, ...]] = [tuple(heading)]
    for gamma in sorted(found.task.nll):
        line: list[object] = [f"{gamma:g}"]
        for sweep in sweeps:
            loss, kls = sweep.losses()[gamma], sweep.kls()
            low, high = loss.interval or (loss.value, loss.value)
            line += [f"{loss.value:.4f}", f"{low:.4f} to {high:.4f}"]
            line += [] if kls is None else [f"{kls[gamma].value:.4f}"]
        lines.append(tuple(line))
    return lines


def _modules(found: "Strength") -> Any:
    """Give the modules whose strength matters most, those that should be weaker first."""
    forgets = any(slope.kl is not None for slope in found.slopes.values())
    yield ("modules, by |dL/dγ|", "dL/dγ", *(["dKL/dγ (retain)"] if forgets else []))
    order = sorted(found.slopes, key=lambda path: -abs(found.slopes[path].value.value))
    for path in order[:MODULES]:
        own = found.slopes[path]
        yield (path, f"{own.value.value:+.4f}", *([f"{own.kl.value:+.4f}"] if own.kl is not None else []))
    rest = order[MODULES:]
    if rest:
        total = sum(found.slopes[path].value.value for path in rest)
        kl = sum(own.value for path in rest if (own := found.slopes[path].kl) is not None)
        yield (f"{len(rest)} more together", f"{total:+.4f}", *([f"{kl:+.4f}"] if forgets else []))


def tell(judgement: "Judgement") -> None:
    """Print a judgement: what it says, and under it what to do and what would refute it."""
    null = "" if judgement.number.null is None else f", {judgement.number.null:g} if there were nothing to see"
    result(f"{style('judged:', 'yellow', sys.stdout)} {judgement.statement} [{judgement.number.kind}{null}]")
    result(f"  next: {judgement.after}\n  refuted by: {judgement.refuted_by}")
