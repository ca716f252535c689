"""An adapter directory at another strength: only its alpha is edited, the tensors stay the bytes they were."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.adapter import Method
from ..core.errors import CheckError, UsageError
from ..core.files import atomic_directory
from ..core.stack import Stack
from ..interop.adapter_directory import CONFIG, SIDE
from ..interop.peft_config import peft_format
from ..interop.peft_reading import read_config
from ..interop.read import read_json, regular_file
from .loaded import LoadedAdapter, LoadedModule, load_adapter
from .skeleton import Layer

SCALES = ("alpha", "scaling", "randlora_alpha")
"""Settings that a method's change is proportional to."""


def rescale(directory: Path, output: Path, gamma: float, layer_of: Callable[[str], Layer] | None = None) -> Path:
    """Write the adapter with γ times its change, and prove that by reading it again.

    layer_of: kind and shape of a layer of the base, for methods whose files do not say them (`BaseWeights.layer`). Raises
    UsageError for a strength that is not positive and for a method without a scale in its file, CheckError if what was
    written is anything else.
    """
    if not (math.isfinite(gamma) and gamma > 0):
        raise UsageError(
            f"strength {gamma:g} leaves nothing of the adapter", fix="discard it: the base model is better without it"
        )
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} exists", fix="choose another directory")
    config = read_json(regular_file(directory, CONFIG))
    side = read_json(regular_file(directory, SIDE)) if (directory / SIDE).exists() else {}
    method, _ = read_config(config, side)
    field = _field(method)
    before = load_adapter(directory, layer_of)
    with atomic_directory(output) as work:
        for file in sorted(directory.iterdir()):
            if file.is_file() and not file.is_symlink() and file.name not in (CONFIG, SIDE):
                (work / file.name).write_bytes(file.read_bytes())
        (work / CONFIG).write_text(json.dumps(_config(config, method, field, gamma), indent=2) + "\n")
        if side:
            (work / SIDE).write_text(json.dumps(_side(side, field, gamma), indent=2) + "\n")
    _prove(before, load_adapter(output, layer_of), gamma)
    return output


def _field(method: Method) -> str:
    """Give the setting that scales the change."""
    found = [name for name in SCALES if vars(method).get(name) is not None]
    if isinstance(method, Stack) or not found:
        raise UsageError(
            f"the files of {type(method).__name__} hold no scale that could be changed",
            why="another strength would have to be written into the trained tensors",
            fix="merge it at that strength, or train it with another one",
        )
    return found[0]


def _config(config: Mapping[str, Any], method: Method, field: str, gamma: float) -> dict[str, Any]:
    """Give `adapter_config.json` with the scale edited, that of single layers too."""
    edited, form = dict(config), peft_format(method)
    key = None if form is None else form.fields.get(field)
    if key is not None and config.get(key) is not None:
        edited[key] = _plain(config[key] * gamma)
    pattern = config.get("alpha_pattern")
    if field == "alpha" and isinstance(pattern, Mapping):
        edited["alpha_pattern"] = {name: _plain(value * gamma) for name, value in pattern.items()}
    return edited


def _side(side: Mapping[str, Any], field: str, gamma: float) -> dict[str, Any]:
    """Give `lorakit.json` with the scale edited."""
    method = dict(side.get("method", {}))
    if method.get(field) is not None:
        method[field] = method[field] * gamma
    parts = {
        path: {
            part: {**own, "alpha": own["alpha"] * gamma} if own.get("alpha") is not None else own
            for part, own in its.items()
        }
        for path, its in side.get("parts", {}).items()
    }
    return {
        **side,
        "method": method,
        **({"parts": parts} if parts else {}),
        "strength": side.get("strength", 1.0) * gamma,
    }


def _prove(before: LoadedAdapter, after: LoadedAdapter, gamma: float) -> None:
    """Compare the scale of every module with what it should be."""
    wrong = [
        old.path
        for old, new in zip(before, after, strict=True)
        if not math.isclose(_size(new), gamma * _size(old), rel_tol=1e-6)
    ]
    if wrong:
        raise CheckError(
            f"{len(wrong)} modules of the adapter that was written are not {gamma:g} times as strong: {', '.join(wrong[:3])}",
            where=str(after.directory),
        )


def _size(module: LoadedModule) -> float:
    """Give a number that is proportional to the change: its scale, or, where it has no factors, its norm."""
    return module.scale if module.A is not None else float(module.delta().norm())


def _plain(value: float) -> float:
    """Write 32.0 as 32: some readers insist on an integer."""
    return int(value) if float(value).is_integer() else value
