"""From a model's name to a directory that transformers' `from_pretrained` loads."""

import difflib
import os
import re
from pathlib import Path

from ..core.errors import FileError, UsageError
from . import minilm, smollm2
from .directory import check_directory

BUILT_IN = {smollm2.NAME: smollm2.directory, minilm.NAME: minilm.directory}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "vocab.txt", "merges.txt", "*.jinja"]
_PICKLED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.py"]


def resolve(name: str | Path) -> Path:
    """A directory for `name`: a built-in model, else a local directory, else a hub id `org/name` (also `hf:org/name`).

    Only a hub id that is not downloaded yet reaches the network, and none does with HF_HUB_OFFLINE or
    TRANSFORMERS_OFFLINE set.
    FileError for a model that is damaged or cannot be had; UsageError for a name that means nothing.
    """
    text = str(name)
    if text in BUILT_IN:
        return BUILT_IN[text]()
    path = Path(text).expanduser()
    if path.is_dir():
        check_directory(path)
        return path
    hub_id = text.removeprefix("hf:")
    if text.startswith("hf:") or (_HUB_ID.fullmatch(text) and not path.parent.is_dir()):
        return _from_hub(hub_id)
    raise _unknown(text, path)


def _unknown(name: str, path: Path) -> UsageError | FileError:
    built_in = "built in: " + ", ".join(BUILT_IN)
    if path.is_file():
        return FileError(
            f"{name} is a file, not a model directory",
            why="a model is a directory with config.json and model.safetensors",
            fix="give the directory; convert other formats with the tool that wrote them",
        )
    siblings = _directories(path.parent)
    near = difflib.get_close_matches(path.name, [*BUILT_IN, *siblings], n=3)
    if path.parent != Path():
        near = [entry if entry in BUILT_IN else str(path.parent / entry) for entry in near]
    return UsageError(
        f"no model called {name!r}",
        why=f"it is neither built in, nor a directory here, nor a hub id; {built_in}",
        fix="did you mean " + " or ".join(near) + "?"
        if near
        else "give a built-in name, a directory, or org/name for the hub",
    )


def _directories(parent: Path) -> list[str]:
    try:
        return [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        return []


def _from_hub(hub_id: str) -> Path:
    if not _HUB_ID.fullmatch(hub_id):
        raise UsageError(f"{hub_id!r} is not a hub id", fix="write it as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def snapshot(local: bool) -> Path:
        return Path(
            snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=_PICKLED, local_files_only=local)
        )

    try:
        path = snapshot(local=True)
        check_directory(path)
        return path
    except HFValidationError as error:
        raise UsageError(f"{hub_id!r} is not a hub id", why=str(error), fix="write it as org/name") from error
    except (LocalEntryNotFoundError, FileError) as error:  # not downloaded, or only in part
        if _offline():
            raise _not_cached(hub_id, "the hub is switched off (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)") from error
    try:
        path = snapshot(local=False)
    except (OSError, ValueError, RuntimeError) as error:  # every network and hub error is one of these
        raise _not_cached(hub_id, f"the hub answered: {_first_line(error)}") from error
    check_directory(path)
    return path


def _not_cached(hub_id: str, why: str) -> FileError:
    return FileError(
        f"the model {hub_id} is not on this machine",
        why=why,
        fix=f"check the id and the network, or give a directory; built in: {', '.join(BUILT_IN)}",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _offline() -> bool:
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.strip().lower() in {"1", "on", "yes", "true"} for value in values)
