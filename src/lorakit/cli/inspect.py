"""`lorakit inspect`: what an adapter's files hold, without loading a base model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from .output import json_result, result, table

PREFIX = "base_model.model."


def inspect(
    adapter: str = typer.Argument(..., metavar="ADAPTER", help="Adapter or run directory.", show_default=False),
    json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Show what an adapter holds.

    Method, rank, targets, size and the norms of its tensors; no base model is loaded.
    """
    from .opened import require_adapter

    found = describe(require_adapter(adapter))
    if json:
        json_result(found)
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
    for warning in found["warnings"]:
        result(f"warning: {warning}")


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
