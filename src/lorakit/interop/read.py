"""Reading files from strangers: bounded before anything is allocated, regular files only, nothing executed or unpickled."""

import ctypes
import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..core.errors import FileError

MAX_JSON = 4 << 20
MAX_HEADER = 8 << 20
MAX_TENSORS = 50_000
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHOWN = 120  # characters of a name from a file


class TensorInfo(NamedTuple):
    """One entry of a safetensors header; `start`: where its bytes begin, from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def bytes(self) -> int:
        """Give the size of its data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


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
        return _header(file, path)


def _header(file: BinaryIO, path: Path) -> dict[str, TensorInfo]:
    """Read the header and leave the file at its end."""
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
        noted = header.pop("__metadata__", None)
        if noted is not None and not all(isinstance(text, str) for text in noted.values()):
            raise ValueError("its metadata are not texts by name")
        infos = {name: _info(name, entry) for name, entry in header.items()}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path.name} has a damaged header", why=str(error)[:200], where=str(path)) from None
    if len(infos) > MAX_TENSORS:
        raise FileError(f"{path.name} has {len(infos)} tensors; at most {MAX_TENSORS}", where=str(path))
    data = sum(info.bytes for info in infos.values())
    if data != size - 8 - length:
        raise FileError(
            f"{path.name} is damaged",
            why=f"its tensors are {data} bytes, the file has {size - 8 - length} for them",
            where=str(path),
        )
    end = 0
    for name, info in _in_file_order(infos):
        if info.start != end:
            why = f"the data of {shown(name)} begins at byte {info.start}, that before it ends at {end}"
            raise FileError(f"{path.name} is damaged", why=why, where=str(path))
        end += info.bytes
    return infos


def _in_file_order(infos: Mapping[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    """Give the entries as their data lie; an empty tensor stands before what begins where it does."""
    return sorted(infos.items(), key=lambda item: (item[1].start, item[1].bytes))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors, each straight into memory of its own, which a parameter may then take over.

    A file that changes later changes nothing here, as it would through a memory map; and nothing is held twice on the way,
    as it is by `safetensors.torch.load`: fresh memory is most of what loading costs.
    """
    tensors: dict[str, Tensor] = {}
    with path.open("rb") as file:
        infos = _header(file, path)
        for name, info in _in_file_order(infos):
            tensors[name] = torch.empty(info.shape, dtype=DTYPES[info.dtype])
            memory = (ctypes.c_char * info.bytes).from_address(tensors[name].data_ptr())  # a tensor gives no buffer
            if file.readinto(memory) != info.bytes:
                raise FileError(f"{path.name} ended while it was read", fix="load it again", where=str(path))
    for name, info in infos.items():
        if info.dtype == "BOOL" and (tensors[name].view(torch.uint8) > 1).any():
            raise FileError(
                f"{path.name} is damaged", why=f"{shown(name)} holds other bytes than 0 and 1", where=str(path)
            )
    return {name: tensors[name] for name in infos}


def _info(name: str, entry: Mapping[str, Any]) -> TensorInfo:
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype not in DTYPES:
        raise ValueError(f"{shown(name)} has the dtype {shown(dtype)}")
    # A size of 0 is right: AdaLoRA may leave a layer no rank.
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise ValueError(f"{shown(name)} has the shape {shown(shape)}")
    start, end = entry["data_offsets"]
    info = TensorInfo(dtype, tuple(shape), start)
    if not type(start) is type(end) is int or end - start != info.bytes:
        raise ValueError(f"{shown(name)} lies at {shown([start, end])} but is {info.bytes} bytes long")
    return info


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
