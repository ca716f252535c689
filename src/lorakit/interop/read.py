"""Reading files from strangers: bounded before anything is allocated, regular files only, nothing ever executed or unpickled."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from ..core.errors import FileError

MAX_JSON = 4 << 20
MAX_HEADER = 16 << 20
MAX_TENSORS = 50_000
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class TensorInfo(NamedTuple):
    """One entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


def regular_file(directory: Path, name: str) -> Path:
    """Give the path of a file that really lies in `directory`. Raises FileError for links out of it, pipes and devices."""
    path = directory / name
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FileError(f"{name} is missing", why=error.strerror, where=str(directory)) from None
    if not stat.S_ISREG(mode) or not path.resolve().is_relative_to(directory.resolve()):
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
    """Read a safetensors header without its data. Raises FileError for anything but plain float tensors within bounds."""
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise FileError(f"{path.name} is not a safetensors file", why=f"header of {length} bytes in a file of {size}", where=str(path))
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        infos = {name: _info(entry) for name, entry in header.items()}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path.name} has a damaged header", why=str(error)[:200], where=str(path)) from None
    if len(infos) > MAX_TENSORS:
        raise FileError(f"{path.name} has {len(infos)} tensors; at most {MAX_TENSORS}", where=str(path))
    odd = [f"{name!r} is {info.dtype}" for name, info in infos.items() if info.dtype not in FLOAT_BYTES]
    if odd:
        raise FileError(f"{path.name} holds tensors that are not plain floats: {some(odd)}", where=str(path))
    return infos


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors into private memory: a file that changes later changes nothing here, as a memory map would."""
    try:
        return safetensors.torch.load(path.read_bytes())
    except Exception as error:  # safetensors raises its own type without a public name for every kind of damage
        raise FileError(f"{path.name} is damaged", why=str(error)[:200], where=str(path)) from None


def _info(entry: Mapping[str, Any]) -> TensorInfo:
    shape = entry["shape"]
    if not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):  # 0: AdaLoRA may leave a layer no rank
        raise ValueError(f"shape {shape}")
    return TensorInfo(str(entry["dtype"]), tuple(shape))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def some(items: list[str], n: int = 5) -> str:
    """List the first n and count the rest."""
    return ", ".join(items[:n]) + (f" and {len(items) - n} more" if len(items) > n else "")
