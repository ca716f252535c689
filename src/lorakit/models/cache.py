"""The cache directory, and how a finished directory appears in it: built beside its final name, flushed, renamed."""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ..core.errors import FileError, ResourceError

_ABANDONED_AFTER = 3600.0  # seconds after which the temporary directory of a killed process may be removed


def cache_dir() -> Path:
    """Where converted models live: `$LORAKIT_CACHE`, else `$XDG_CACHE_HOME/lorakit`, else `~/.cache/lorakit`."""
    if own := os.environ.get("LORAKIT_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "lorakit"
    return Path.home() / ".cache" / "lorakit"


def publish(target: Path, build: Callable[[Path], None], check: Callable[[Path], None]) -> Path:
    """Let `build` fill a temporary directory, then rename it to `target`: readers see all of it or nothing.

    `check` raises FileError for a directory that cannot be used; one that passes is left as it is. Two processes may
    publish the same target at once: both succeed, and the later one keeps what the earlier one put there.
    """
    if _usable(target, check):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        draft = _beside(target)
        try:
            build(draft)
            check(draft)
            _flush(draft)
            _place(draft, target, check)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise _explained(error, target) from error
    return target


def _usable(target: Path, check: Callable[[Path], None]) -> bool:
    try:
        check(target)
    except FileError:
        return False
    return True


def _beside(target: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))


def _place(draft: Path, target: Path, check: Callable[[Path], None]) -> None:
    while True:
        try:
            draft.rename(target)  # succeeds where nothing, or an empty directory, stands
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _usable(target, check):
            break
        damaged = _beside(target)
        target.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    _flush_directory(target.parent)


def _sweep(target: Path) -> None:
    for old in target.parent.glob(f".{target.name}.*"):
        try:
            if time.time() - old.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(old, ignore_errors=True)
        except FileNotFoundError:
            continue


def _flush(directory: Path) -> None:
    """Put the files on disk before the rename does, and undo the private mode temporary files are made with."""
    directory.chmod(0o755)
    for path in sorted(directory.iterdir()):
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    if os.name != "posix":  # Windows cannot open a directory for syncing
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explained(error: OSError, target: Path) -> FileError | ResourceError:
    where, why = str(target), error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            "no space left to write the model into the cache",
            why=why,
            fix="free some space, or point LORAKIT_CACHE at another disk",
            where=where,
        )
    return FileError(
        "cannot write the model into the cache",
        why=why,
        fix="make the directory writable, or point LORAKIT_CACHE at one that is",
        where=where,
    )
