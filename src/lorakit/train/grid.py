"""A grid of runs: `lr=[1e-4,3e-4] r=[4,8]` is four configurations, one for each choice of values."""

import json
import re
import types
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from ..core.errors import UsageError
from .config import RunConfig
from .config_file import default_output, load
from .config_schema import all_keys
from .config_settings import Findings, override_value, read_overrides


class Axis(NamedTuple):
    """A key, as it was typed, and its values."""

    key: str
    values: list[Any]


def grid(path: Path | None, overrides: Sequence[str]) -> tuple[dict[str, RunConfig], list[str]]:
    """Give the configurations by the names of their directories (`lr=0.0001,r=4`, inside the output), and the notices.

    An override is an axis if its value is a list where one value is expected, or a list of lists where a list is. Raises
    UsageError without an axis, and what `load` raises for each configuration.
    """
    read = {text: axis for text in overrides if (axis := _axis(text)) is not None}
    if not read:
        raise UsageError("there is nothing to sweep", fix="give a key several values: lr=[1e-4,3e-4] r=[4,8]")
    fixed, axes = [text for text in overrides if text not in read], list(read.values())
    found: dict[str, RunConfig] = {}
    said: list[str] = []
    for values in product(*(axis.values for axis in axes)):
        chosen = [f"{axis.key}={json.dumps(value)}" for axis, value in zip(axes, values, strict=True)]
        config, said = load(path, [*fixed, *chosen])
        label = ",".join(_label(axis.key, value) for axis, value in zip(axes, values, strict=True))
        if label in found:
            raise UsageError(f"two runs are {label}", fix="give each value once")
        around = config.output if config.output != default_output(config.data.path) else f"{config.output}-sweep"
        found[label] = load(path, [*fixed, *chosen, f"output={json.dumps(str(Path(around) / label))}"])[0]
    return found, said


def _axis(text: str) -> Axis | None:
    """Give the override as an axis, or None if it is one value."""
    key, _, value = text.partition("=")
    values = override_value(value, text).plain()
    if not isinstance(values, list) or not values:
        return None
    lists = all(isinstance(item, list) for item in values)
    return Axis(key, values) if lists or not _takes_list(key, values[0]) else None


def _takes_list(key: str, example: Any) -> bool:
    """Whether the key's own value is a list, under whatever name it was typed."""
    meant = read_overrides([f"{key}={json.dumps(example)}"], Findings())
    homes = [dotted.partition(".") for dotted in meant]
    return any(_is_list(all_keys()[s][name].hint) for s, _, name in homes if name in all_keys().get(s, {}))


def _is_list(hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _is_list(arguments[0])
    if origin in (Union, types.UnionType):
        return any(map(_is_list, arguments))
    return origin in (list, tuple, Sequence)


def _label(key: str, value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9=.+_-]+", "_", f"{key.rpartition('.')[2]}={text}")
