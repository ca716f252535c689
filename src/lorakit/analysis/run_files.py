"""What a run directory holds, read for people: nothing is required, nothing damaged stops the reading."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from ..core.errors import FileError

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A trained adapter in figures. `kinds` maps the last name of a layer to (layers, parameters)."""

    settings: dict[str, Any]
    size: int
    tensors: int
    parameters: int
    kinds: dict[str, tuple[int, int]]
    problem: str | None = None


@dataclass(frozen=True)
class Run:
    """One training run: the records of its optimizer steps, evaluations and samples, and what it was made of."""

    name: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    adapter: Adapter | None = None

    @property
    def last_step(self) -> int:
        """The step the run has come to; 0 before the first."""
        return max((r["step"] for r in [*self.steps, *self.evaluations]), default=0)

    def last(self, key: str) -> float | None:
        """Give the last finite value of `key` among the optimizer steps."""
        return next((v for r in reversed(self.steps) if (v := number(r.get(key))) is not None), None)

    def points(self, key: str) -> tuple[list[float], list[float]]:
        """Give (steps, values) of the finite values of `key` among the optimizer steps."""
        return _points(self.steps, key)

    def evaluated(self, key: str) -> tuple[list[float], list[float]]:
        """Give (steps, values) of the finite values of `key` among the evaluations."""
        return _points(self.evaluations, key)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories; each gets the shortest name that tells it from the others. FileError if one is missing."""
    for path in paths:
        if not path.is_dir():
            raise FileError(f"{path} is not a run directory", fix="give the `output` directory of a training run")
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_run(path: Path, name: str) -> Run:
    """Read one run directory."""
    records = _records(path / "metrics.jsonl")
    return Run(
        name=name,
        steps=[r for r in records if "loss" in r],
        evaluations=[r for r in records if "eval_loss" in r or "eval_accuracy" in r],
        samples=[r for r in _records(path / "samples.jsonl") if isinstance(r.get("prompt"), str)],
        config=flatten(_yaml(path / "config.yaml")),
        environment=flatten(_json(path / "env.json")),
        adapter=read_adapter(path / "adapter") if (path / "adapter" / "adapter_config.json").is_file() else None,
    )


def read_adapter(path: Path) -> Adapter:
    """Read the settings of an adapter directory and the shapes, not the values, of its tensors."""
    settings = {k: v for k, v in _json(path / "adapter_config.json").items() if v not in (None, [], {}, False)}
    file = path / ADAPTER_FILE
    layers: dict[str, set[str]] = {}
    parameters: Counter[str] = Counter()
    tensors, problem = 0, None
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():
                layer, kind = _layer(name)
                layers.setdefault(kind, set()).add(layer)
                parameters[kind] += math.prod(content.get_slice(name).get_shape())
                tensors += 1
    except (OSError, SafetensorError) as error:
        problem = f"{ADAPTER_FILE} cannot be read: {error}"
    size = file.stat().st_size if file.is_file() else 0
    kinds = {kind: (len(layers[kind]), parameters[kind]) for kind in sorted(parameters)}
    return Adapter(settings, size, tensors, parameters.total(), kinds, problem)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give the leaves of nested mappings under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def number(value: object) -> float | None:
    """Give a number as a float; None for anything else, and for what is too large to be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value) if abs(value) > 1e-100 else 0.0


def _layer(tensor: str) -> tuple[str, str]:
    """Split `base_model.model.h.0.attn.q_proj.lora_A.weight` into the layer's path and its last name, `q_proj`."""
    parts = [p for p in tensor.split(".") if p not in ("base_layer", "default")]
    own = next((i for i, p in enumerate(parts) if p.startswith(("lora_", "vera_", "hada_", "lokr_", "ia3_"))), -1)
    layer = parts[:own]
    return ".".join(layer), layer[-1] if layer else tensor


def _points(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    found = [(float(r["step"]), v) for r in records if (v := number(r.get(key))) is not None]
    return [x for x, _ in found], [y for _, y in found]


def _names(paths: Sequence[Path]) -> list[str]:
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1)):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]


def _records(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file. The last line of a run that is being written may be torn; it is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return sorted(records, key=lambda r: r["step"])


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
