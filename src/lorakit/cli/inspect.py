"""`lorakit inspect`: what an adapter's files hold and what its matrices say, without loading a model."""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import UsageError
from .output import json_result, note, result, style, table

if TYPE_CHECKING:
    from ..analysis.inspection import Inspection, Measured

PREFIX = "base_model.model."


def inspect(
    adapter: str = typer.Argument(..., metavar="ADAPTER", help="Adapter or run directory.", show_default=False),
    base: str = typer.Option(None, "--base", help="Base model: adds what compares the change with its weights."),
    intruders: bool = typer.Option(False, "--intruders", help="With --base: count intruder dimensions (minutes)."),
    json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
    html: Path = typer.Option(None, "--html", metavar="FILE", help="Write a page with heat maps and spectra."),
    png: Path = typer.Option(None, "--png", metavar="FILE", help="Draw them as one picture (extra: plot)."),
) -> None:
    """Show what an adapter holds.

    Method, rank, targets, size; of every changed matrix norms and ranks beside those of random factors. No data is read and
    no model is loaded; with --base its weights are read one matrix at a time. There is no score: verdicts are only about
    what is certain (dead modules, NaN, contradicting scales, unconverted starts, storage precision).
    """
    from .machine import set_threads
    from .opened import require_adapter

    if intruders and base is None:
        raise UsageError("--intruders needs the base weights", fix="--base MODEL")
    if png is not None:
        from ..analysis.inspect_picture import figure_class

        figure_class()  # before minutes of measuring
    set_threads()
    directory = require_adapter(adapter)
    found = describe(directory)
    measured = _measure(directory, base, intruders)
    if html is not None:
        from ..analysis.inspect_page import write_page

        note(f"page: {write_page(found, measured, html)}")
    if png is not None:
        from ..analysis.inspect_picture import write_picture

        note(f"picture: {write_picture(found, measured, png)}")
    if json:
        json_result({**found, **measured.json(), "modules": _joined(found["modules"], measured)})
        return
    facts = (
        "method",
        "r",
        "alpha",
        "target_modules",
        "modules_to_save",
        "base",
        "task",
        "parameters",
        "layers",
        "dtype",
    )
    result(table([(name, _short(found[name])) for name in facts]))
    result(f"size  {found['bytes'] / 1e6:.2f} MB in {found['directory']}\n")
    rows: list[tuple[object, ...]] = [("tensor", "layers", "smallest norm", "median", "largest")]
    result(table([*rows, *_summaries(found["modules"])]))
    _show(measured)
    for warning in found["warnings"]:
        result(f"warning: {warning}")


def _measure(directory: Path, base: str | None, intruders: bool) -> "Inspection":
    from ..analysis.inspection import inspect_adapter
    from ..interop.adapter_directory import CONFIG, WEIGHTS
    from ..interop.read import read_header, regular_file
    from .opened import read_json

    weights = None
    if base is not None:
        from ..analysis.base_weights import BaseWeights
        from ..models.resolve import resolve

        weights = BaseWeights(resolve(base))
    header = read_header(regular_file(directory, WEIGHTS))
    return inspect_adapter(directory, header, read_json(directory / CONFIG), weights, intruders=intruders)


def _joined(tensors: dict[str, Any], measured: "Inspection") -> dict[str, Any]:
    """Give each module its tensors, by name as they stand in the file, and what was measured of it."""
    numbers = measured.json()["modules"]
    return {path: {**tensors.get(path, {}), **numbers.get(path, {})} for path in dict.fromkeys([*tensors, *numbers])}


def _show(measured: "Inspection") -> None:
    """Print a row per kind of module, each number beside its null, then what is certain and what was not measured."""
    from ..analysis.inspection import by_name

    if measured.modules:
        rows = [_row(name, its) for name, its in by_name(measured.modules).items()]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        result("")
        result(table([tuple(columns), *(tuple(row.get(c, "-") for c in columns) for row in rows)]))
        result("in brackets: the same of random factors of that shape; medians over the modules of a row")
    for name, number in measured.numbers.items():
        result(f"{name.replace('_', ' ')}: {number.value:.6f}")
    for text in measured.notes:
        result(f"note: {text}")
    for verdict in measured.verdicts:
        result(f"{style('certain:', 'yellow', sys.stdout)} {verdict}")
    for what, why in list(measured.not_measured.items())[:8]:
        result(f"not measured: {what} ({why})")


def _row(name: str, its: "list[Measured]") -> dict[str, object]:
    def values(key: str) -> list[float]:
        return [m.numbers[key].value for m in its if key in m.numbers and math.isfinite(m.numbers[key].value)]

    def beside_null(key: str) -> str:
        nulls = [null for m in its if key in m.numbers and (null := m.numbers[key].null) is not None]
        return f"{median(values(key)):.3g}" + (f" ({median(nulls):.3g})" if nulls else "")

    ranks = sorted({m.module.rank for m in its if m.module.rank is not None})
    row: dict[str, object] = {"module": name, "count": len(its)}
    row["r"] = "-" if not ranks else f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    if values("frobenius"):
        row["norm"] = f"{median(values('frobenius')):.3g}"
    titles = {"effective_rank": "eff. rank", "stable_rank": "stable rank", "energy_rank_90": "90 % energy"}
    row |= {title: beside_null(key) for key, title in titles.items() if values(key)}
    if values("imbalance"):
        row["imbalance"] = f"{median(values('imbalance')):.2g}"
    if values("relative_norm"):
        row["rel. norm"] = f"{median(values('relative_norm')):.2e}"
    row |= {key: beside_null(key) for key in ("amplification", "dominance") if values(key)}
    if values("intruders_attributable"):
        counts = (int(sum(values(f"intruders_{kind}"))) for kind in ("attributable", "smeared"))
        row["intruders"] = "{} + {} smeared".format(*counts)
    return row


def describe(directory: Path) -> dict[str, Any]:
    """Read an adapter directory: its configuration, and the shape and Frobenius norm of every tensor."""
    from ..interop.adapter_directory import CONFIG, SIDE, WEIGHTS
    from ..interop.read import read_header, read_tensors, regular_file
    from .opened import read_json

    config = read_json(directory / CONFIG)
    side = read_json(directory / SIDE) if (directory / SIDE).exists() else {}
    file = regular_file(directory, WEIGHTS)
    header = read_header(file)
    tensors = read_tensors(file)
    modules: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        path, name = _split(key)
        modules.setdefault(path, {})[name] = {"shape": list(tensor.shape), "norm": float(tensor.double().norm())}
    own = {k: v for k, v in side.get("method", {}).items() if k != "name"} or {
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
    }
    return {
        "directory": str(directory),
        "method": side.get("method", {}).get("name") or str(config.get("peft_type", "")).lower(),
        "r": own.get("r"),
        "alpha": own.get("alpha") if own.get("alpha") is not None else config.get("lora_alpha"),
        "settings": own,
        "target_modules": config.get("target_modules"),
        "modules_to_save": config.get("modules_to_save"),
        "base": config.get("base_model_name_or_path"),
        "task": config.get("task_type"),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "layers": len(modules),
        "dtype": ", ".join(sorted({info.dtype for info in header.values()})),
        "bytes": sum(f.stat().st_size for f in directory.iterdir() if f.is_file()),
        "modules": modules,
        "warnings": list(_warnings(modules)),
    }


def _split(key: str) -> tuple[str, str]:
    """Give (layer, tensor) of a key: `base_model.model.a.b.lora_A.weight` is ("a.b", "lora_A")."""
    path, _, name = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    return path, name


def _warnings(modules: dict[str, dict[str, Any]]) -> Iterator[str]:
    zero = [f"{path}.{name}" for path, its in modules.items() for name, t in its.items() if t["norm"] == 0]
    if zero:
        yield f"{len(zero)} tensors are all zero, so these layers may be untrained: {', '.join(zero[:3])}"
    bad = [f"{path}.{name}" for path, its in modules.items() for name, t in its.items() if not t["norm"] < float("inf")]
    if bad:
        yield f"{len(bad)} tensors hold NaN or infinity: {', '.join(bad[:3])}"


def _summaries(modules: dict[str, dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    """Give a row per kind of layer and tensor: the same leaf in all blocks together."""
    norms: dict[str, list[float]] = {}
    for path, its in modules.items():
        leaf = re.sub(r"^.*\.\d+\.", "", path)
        for name, tensor in its.items():
            norms.setdefault(f"{leaf}.{name}", []).append(tensor["norm"])
    for name, values in norms.items():
        values.sort()
        yield name, len(values), values[0], values[len(values) // 2], values[-1]


def _short(value: object) -> object:
    if isinstance(value, list):
        return " ".join(map(str, value[:12])) + (f" and {len(value) - 12} more" if len(value) > 12 else "")
    return "-" if value is None else value
