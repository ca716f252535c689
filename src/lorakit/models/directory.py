"""A model directory as files: what must be there, the tensors its safetensors headers declare, and its content id."""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import FileError

_MAX_HEADER = 32 << 20  # bytes; real headers are below 1 MB a shard, a hostile one can cost a minute to parse
_MAX_JSON = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 16, 64  # blocks read from every tensor for the content id
_VOLATILE = {"transformers_version", "_name_or_path", "name_or_path", "torch_dtype", "dtype", "use_cache"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as a safetensors header declares it; `start` and `stop` are byte positions in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def check_directory(path: Path) -> None:
    """Refuse a directory `from_pretrained` could not load safely: a FileError says what is missing or damaged."""
    if (path / "adapter_config.json").is_file():
        raise FileError(
            f"{path} is an adapter, not a model",
            why="it holds adapter_config.json",
            fix="give the base model here and the adapter where an adapter is asked for",
        )
    for file in path.glob("*.json"):
        if file.stat().st_size > _MAX_JSON:
            raise FileError(f"{file.name} is larger than {_MAX_JSON >> 20} MB", where=str(file))
    read_json(path / "config.json")
    tensors(path)


def read_json(path: Path) -> dict:
    """The JSON object in `path`; FileError when it is missing, too large or not an object."""
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would block the read
            raise FileError(f"{path.name} is not a regular file", where=str(path))
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"there is no {path.name} in the model directory", where=str(path.parent)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"cannot read {path.name}", why=str(error), where=str(path)) from error
    if not isinstance(content, dict):
        raise FileError(f"{path.name} does not hold a JSON object", where=str(path))
    return content


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory by name, from the headers alone (no weight is read).

    A shard that is missing, cut short or not safetensors is a FileError, and so is a directory with pickles only.
    """
    found: dict[str, Tensor] = {}
    for shard in _shards(path):
        found |= _header(shard)
    return found


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        if (path / "model.safetensors").is_file():
            return [path / "model.safetensors"]
        raise _no_weights(path)
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise FileError("the index of the weight shards is damaged", why="no usable weight_map", where=str(index))
    shards = [path / name for name in sorted(names)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise FileError(
            f"weight shards are missing: {', '.join(missing)}", fix="download the model again", where=str(path)
        )
    return shards


def _no_weights(path: Path) -> FileError:
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return FileError(
            f"{path} holds its weights only as pickles ({', '.join(pickles[:3])})",
            why="a pickle can run any code when it is opened, so lorakit never opens one",
            fix="convert it to safetensors where you trust it: model.save_pretrained(directory)",
        )
    return FileError(f"{path} has no model.safetensors", fix="give a directory written by save_pretrained")


def _header(file: Path) -> dict[str, Tensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size):
            raise FileError(f"{file.name} is not a safetensors file or is damaged", where=str(file))
        text = stream.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        body = 8 + length
        found = {
            name: Tensor(
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                body + entry["data_offsets"][0],
                body + entry["data_offsets"][1],
            )
            for name, entry in entries.items()
        }
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise FileError(f"the header of {file.name} is damaged", why=str(error), where=str(file)) from error
    expected = max((tensor.stop for tensor in found.values()), default=body)
    if expected != size:
        raise FileError(
            f"{file.name} is damaged: {size} bytes where its header describes {expected}",
            fix="download or copy the model again",
            where=str(file),
        )
    return found


def fingerprint(path: Path | str) -> str:
    """A content id of a base model, to match an adapter with the base it was trained on.

    Covers the meaning-bearing part of config.json (not the version or dtype notes) and, of every tensor, its name,
    dtype, shape and 16 blocks of 64 bytes spread evenly over it. So it does not depend on file names or sharding, costs
    milliseconds, and changes with any training or merge that touches a tensor as a whole; an edit of single numbers
    between the blocks goes unseen, so it is no proof against tampering.
    """
    path = Path(path)
    digest = hashlib.sha256(b"lorakit base 1\n")
    config = {key: value for key, value in read_json(path / "config.json").items() if key not in _VOLATILE}
    digest.update(json.dumps(config, sort_keys=True).encode())
    declared = tensors(path)
    streams = {file: file.open("rb") for file in {tensor.file for tensor in declared.values()}}
    try:
        for name, tensor in sorted(declared.items()):
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            for block in _blocks(tensor):
                streams[tensor.file].seek(block)
                digest.update(streams[tensor.file].read(min(_SAMPLE_BYTES, tensor.stop - block)))
    finally:
        for stream in streams.values():
            stream.close()
    return digest.hexdigest()


def _blocks(tensor: Tensor) -> list[int]:
    span = tensor.stop - tensor.start
    if span <= _SAMPLES * _SAMPLE_BYTES:
        return list(range(tensor.start, tensor.stop, _SAMPLE_BYTES))
    last = span - _SAMPLE_BYTES
    return [tensor.start + last * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
