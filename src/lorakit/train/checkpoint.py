"""Checkpoints: a directory `step-000040/` of safetensors and JSON that is either whole or recognised as damaged.

    checkpoints/step-000040/adapter.safetensors   one file per entry of `tensors`
                            optimizer.safetensors
                            state.json            everything that is not a tensor
                            manifest.json         written last: size and sha256 of each file, versions, own digest

Nothing is unpickled, so a foreign checkpoint cannot run code. The newest checkpoint is the one with the highest step
whose files all agree with its manifest; times of modification play no part. An old one is deleted only after the new
one is in place.
"""

import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..core.errors import FileError, UsageError
from ..core.files import atomic_directory, discard, reclaim

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
VERSIONS = {"lorakit": __version__, "torch": torch.__version__}
_NAME = re.compile(r"step-(\d{6,12})")
_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files agreed with its manifest when it was looked at."""

    path: Path
    step: int
    config_hash: str
    versions: dict[str, str]


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    protect: Collection[int] = (),
    config_hash: str = "",
) -> Path:
    """Write `directory/step-<step>`, then delete all checkpoints but the newest `keep` and the steps in `protect`.

    `tensors` maps file stems to named tensors, `state` is plain JSON (string keys). Checkpoints of later steps belong
    to a continuation that was given up and are deleted too. Raises ResourceError if the disk is full or fails; every
    older checkpoint is then still there.
    """
    if keep < 1:
        raise UsageError(f"cannot keep {keep} checkpoints", fix="keep at least 1")
    target = directory / f"step-{step:06d}"
    with atomic_directory(target) as fresh:
        for stem, named in tensors.items():
            if not _STEM.fullmatch(stem):
                raise UsageError(f"{stem!r} cannot name a checkpoint file", fix="use letters, digits, - and _")
            _write_tensors(fresh / f"{stem}.safetensors", named)
        (fresh / STATE).write_text(json.dumps(state), encoding="utf-8")
        files = {f.name: {"size": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(fresh.iterdir())}
        manifest = {"format": FORMAT, "step": step, "config_hash": config_hash, "versions": VERSIONS, "files": files}
        (fresh / MANIFEST).write_text(_sealed(manifest), encoding="utf-8")
    _retain(directory, step, keep, protect)
    return target


def latest(directory: Path, *, fallback: bool = True) -> Checkpoint | None:
    """Give the newest whole checkpoint in `directory`, or None; each damaged one passed over is named in a warning.

    With `fallback=False` a damaged newest checkpoint is a FileError; so is, always, one made by a newer format.
    """
    with suppress(OSError):  # a directory that is read-only can be read all the same
        reclaim(directory)
    for step, path in sorted(steps(directory).items(), reverse=True):
        problems = verify(path)
        if not problems:
            return _checkpoint(path, step)
        if not fallback:
            raise _damaged(path, problems)
        log.warning("checkpoint %s is damaged and passed over: %s", path, "; ".join(problems))
    return None


def steps(directory: Path) -> dict[int, Path]:
    """List the checkpoints in `directory` by step, whole or not. Other names and symbolic links are not looked at."""
    found = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.name == f"step-{int(match[1]):06d}" and path.is_dir() and not path.is_symlink():
            found[int(match[1])] = path
    return found


def verify(path: Path) -> list[str]:
    """Compare every file of a checkpoint with its manifest; an empty list means it is whole.

    Raises FileError if a newer version of this program wrote it in a format that this one does not know.
    """
    try:
        manifest = _manifest(path)
    except ValueError as error:
        return [f"{MANIFEST}: {error}"]
    return [problem for name, entry in manifest["files"].items() if (problem := _compare(path / name, entry))]


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint into memory of our own (no memory map, which a later write to the file could change).

    The bytes that are parsed are the bytes that are verified. Raises FileError with every problem if it is damaged.
    """
    problems: list[str] = []
    tensors: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] = {}
    try:
        manifest = _manifest(path)
    except ValueError as error:
        raise _damaged(path, [f"{MANIFEST}: {error}"]) from error
    for name, entry in manifest["files"].items():
        content = b"" if _not_plain(path / name) else (path / name).read_bytes()
        if len(content) != entry["size"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            problems.append(_compare(path / name, entry) or f"{name}: changed while it was read")
        elif name == STATE:
            state = json.loads(content)
        else:
            try:
                tensors[Path(name).stem] = parse_safetensors(content)
            except SafetensorError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise _damaged(path, problems)
    return tensors, state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the state of any torch optimizer into named tensors and plain JSON; `restore_optimizer` is the inverse."""
    tensors: dict[str, Tensor] = {}
    return tensors, _split(optimizer.state_dict(), "", tensors)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Give `optimizer`, made for the same parameters, the state that `optimizer_tensors` took, bit for bit.

    Raises FileError if the parameters are not the same ones in the same groups.
    """
    saved = _join(scalars, tensors)
    wanted = [_members(group) for group in saved["param_groups"]]
    present = [_members(group) for group in optimizer.state_dict()["param_groups"]]
    if wanted != present:
        differing = sorted({str(n) for g in wanted for n in g} ^ {str(n) for g in present for n in g})
        raise FileError(
            "the checkpoint's optimizer state belongs to other trainable parameters",
            why=f"they differ in {', '.join(differing[:4])}" if differing else "their groups or their order differ",
            fix="resume with the configuration of the checkpoint, or start a new run in another directory",
        )
    optimizer.load_state_dict(saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, kept in saved["state"].items():  # load_state_dict casts to the parameter's dtype; undo that
        current = optimizer.state[parameters[index]]
        for key, value in kept.items():
            if isinstance(value, Tensor) and value.dtype != current[key].dtype:
                current[key] = value.to(current[key].device)


def _members(group: Mapping[str, Any]) -> list[Any]:
    return list(group["param_names"] if "param_names" in group else group["params"])


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace each tensor in a nested structure by its path; mark dicts and tuples, which JSON would not give back."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[key, _split(inner, f"{path}.{key}".lstrip("."), tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        parts = [_split(inner, f"{path}.{i}".lstrip("."), tensors) for i, inner in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"the optimizer keeps a {type(value).__name__} at {path!r}, which a checkpoint cannot hold")


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(inner, tensors) for inner in value]
    if not isinstance(value, Mapping):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _join(inner, tensors) for key, inner in content}
    if kind == "tuple":
        return tuple(_join(inner, tensors) for inner in content)
    if content not in tensors:
        raise FileError(f"the checkpoint's optimizer state lacks the tensor {content!r}")
    return tensors[content].clone()


def _write_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    """Write one safetensors file. The library wants contiguous tensors that share no memory."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    try:
        save_file(plain, path)
    except SafetensorError as error:  # it reports a failed write as text: "... (os error 28)"
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), str(error), str(path)) from error


def _retain(directory: Path, step: int, keep: int, protect: Collection[int]) -> None:
    present = steps(directory)
    kept = {*sorted((s for s in present if s <= step), reverse=True)[:keep], *protect}
    for old, path in sorted(present.items()):
        if old not in kept:
            discard(path)


def _sealed(manifest: Mapping[str, Any]) -> str:
    """Give the one text of a manifest, with a digest over all of it: no bit of the file can change unnoticed."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "digest": digest}, indent=1, sort_keys=True)


def _manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint; ValueError if it is missing or damaged, FileError if it is too new."""
    if _not_plain(path / MANIFEST):
        raise ValueError("missing")
    content = (path / MANIFEST).read_bytes()
    try:
        manifest = json.loads(content)
        del manifest["digest"]
        intact = _sealed(manifest).encode() == content and _well_formed(manifest)
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError("damaged")
    if manifest["format"] > FORMAT:
        raise FileError(
            f"checkpoint {path.name} was made by a newer version of lorakit",
            why=f"it was written by {manifest['versions'].get('lorakit', '?')}, this is {__version__}",
            fix="update lorakit, or resume from an older checkpoint by moving this one away",
            where=str(path),
        )
    if path.name != f"step-{manifest['step']:06d}":
        raise ValueError(f"it is that of step {manifest['step']}")
    return manifest


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    numbers = isinstance(manifest["format"], int) and isinstance(manifest["step"], int)
    names = all(Path(name).name == name for name in manifest["files"])
    entries = all(isinstance(e["size"], int) and isinstance(e["sha256"], str) for e in manifest["files"].values())
    return numbers and names and entries and isinstance(manifest["config_hash"], str)


def _compare(path: Path, entry: Mapping[str, Any]) -> str | None:
    if _not_plain(path):
        return f"{path.name}: missing"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{path.name}: {size} bytes instead of {entry['size']}"
    return None if _sha256(path) == entry["sha256"] else f"{path.name}: its content does not match its sha256"


def _not_plain(path: Path) -> bool:
    return path.is_symlink() or not path.is_file()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoint(path: Path, step: int) -> Checkpoint:
    manifest = _manifest(path)
    return Checkpoint(path, step, manifest["config_hash"], manifest["versions"])


def _damaged(path: Path, problems: list[str]) -> FileError:
    return FileError(
        f"checkpoint {path.name} is damaged",
        why="; ".join(problems),
        fix="delete it and run the same command again: it resumes from the checkpoint before",
        where=str(path),
    )
