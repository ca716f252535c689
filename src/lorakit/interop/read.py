"""Reading files from strangers: bounded before anything is allocated, regular files only, nothing executed or unpickled."""

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from ..core.errors import FileError

MAX_JSON = 4 << 20
MAX_HEADER = 8 << 20
MAX_TENSORS = 50_000
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SHOWN = 120  # characters of a name from a file


class TensorInfo(NamedTuple):
    """One entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


def regular_file(directory: Path, name: str) -> Path:
    """Give the path of a file that really lies in `directory`. Raises FileError for links out of it, pipes and devices.

    The hub's cache keeps `snapshots/<revision>/<name>` as links to `blobs/` beside `snapshots`: those are followed.
    """
    path, root = directory / name, directory.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FileError(f"{name} is missing", why=error.strerror, where=str(directory)) from None
    if not stat.S_ISREG(mode) or not path.resolve().is_relative_to(root):
        raise FileError(f"{name} is not a regular file inside the directory", where=str(path))
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object: at most 4 MiB, UTF-8, no field twice."""
    if path.stat().st_size > MAX_JSON:
        raise FileError(f"{path.name} is larger than {MAX_JSON} bytes", where=str(path))
    try:
        value = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path.name} is not valid JSON", why=str(error)[:200], where=str(path)) from None
    if not isinstance(value, dict):
        raise FileError(f"{path.name} holds a {type(value).__name__}, not an object", where=str(path))
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read a safetensors header without its data. Raises FileError unless it is whole, bounded and fits the file's size."""
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise FileError(
                f"{path.name} is not a safetensors file",
                why=f"header of {length} bytes in a file of {size}",
                where=str(path),
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        infos = {name: _info(name, entry) for name, entry in header.items()}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path.name} has a damaged header", why=str(error)[:200], where=str(path)) from None
    if len(infos) > MAX_TENSORS:
        raise FileError(f"{path.name} has {len(infos)} tensors; at most {MAX_TENSORS}", where=str(path))
    data = sum(math.prod(info.shape) * BYTES[info.dtype] for info in infos.values())
    if data != size - 8 - length:
        raise FileError(
            f"{path.name} is damaged",
            why=f"its tensors are {data} bytes, the file has {size - 8 - length} for them",
            where=str(path),
        )
    return infos


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors into private memory: a file that changes later changes nothing here, as a memory map would."""
    try:
        return safetensors.torch.load(path.read_bytes())
    except Exception as error:  # safetensors raises its own type without a public name for every kind of damage
        raise FileError(f"{path.name} is damaged", why=shown(str(error)), where=str(path)) from None


def _info(name: str, entry: Mapping[str, Any]) -> TensorInfo:
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype not in BYTES:
        raise ValueError(f"{shown(name)} has the dtype {shown(dtype)}")
    # A size of 0 is right: AdaLoRA may leave a layer no rank.
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise ValueError(f"{shown(name)} has the shape {shown(shape)}")
    return TensorInfo(dtype, tuple(shape))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} stands there twice")
        found[name] = value
    return found


def shown(value: object) -> str:
    """Give something from a file as one short line without control characters."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def some(items: list[str], n: int = 5) -> str:
    """List the first n and count the rest."""
    return ", ".join(items[:n]) + (f" and {len(items) - n} more" if len(items) > n else "")
