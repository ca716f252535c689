"""Files and directories that a crash, a kill or a full disk leave whole: the old version or the new one, no mixture.

New content is written into a hidden workspace beside its target (same file system, so a rename can move it), every
file and directory of it is flushed to the disk, and one rename makes it visible. What it replaces is moved into the
workspace first and deleted last. A workspace is locked by the process that owns it, so that one left by a dead process
is recognised without trusting process ids, and is cleaned up by whoever writes next in the same directory.
"""

import ctypes
import errno
import fcntl
import functools
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from .errors import FileError, LockError, ResourceError

WORKSPACE = ".lorakit-tmp-"  # prefix of our workspaces; any other hidden file is not ours to touch
LOCK = ".lock"

_FULL = "free some space or write to another disk, then run the same command again"
_DISK_ERRORS = {
    errno.ENOSPC: ("no space left on the disk", _FULL),
    errno.EDQUOT: ("the disk quota is used up", _FULL),
    errno.EFBIG: ("the file is larger than the file system or `ulimit -f` allows", "raise the limit"),
    errno.EROFS: ("the file system is read-only", "choose an output directory on a writable disk"),
    errno.EIO: ("the disk reported an input/output error", "check the disk (`dmesg`), then write to another one"),
}


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn what the operating system says about a failed write under `path` into a ResourceError or FileError."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            why, fix = _DISK_ERRORS[error.errno]
            raise ResourceError(f"cannot write {path.name}", why=why, fix=fix, where=str(path)) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            fix = "change its permissions or choose another output directory"
            raise FileError(f"cannot write {path.name}", why="permission denied", fix=fix, where=str(path)) from error
        raise


@contextmanager
def atomic_directory(target: Path) -> Generator[Path]:
    """Yield an empty directory to fill; if the block ends without an error it becomes `target`, replacing an old one.

    Raises ResourceError (disk full, read-only, failing) or FileError (permissions); `target` is then as it was.
    """
    target = Path(os.path.realpath(target))
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _workspace(target.parent) as work:
            fresh = work / "new"
            fresh.mkdir()
            yield fresh
            for file in fresh.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)  # safetensors makes files that only their owner can read
            _sync_tree(fresh)
            _commit(fresh, target, work)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write one file (text as UTF-8) so that `path` holds the old or the new content at every instant.

    Raises ResourceError (disk full, read-only, failing) or FileError (permissions); `path` is then as it was.
    """
    path = Path(os.path.realpath(path))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _workspace(path.parent) as work:
            fresh = work / "new"
            fresh.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(fresh)
            fresh.replace(path)
            sync(path.parent)


def discard(directory: Path) -> None:
    """Delete a directory so that a kill half-way leaves nothing under its name that could be taken for a whole one."""
    with disk_errors(directory), _workspace(directory.parent) as work:
        directory.rename(work / "trash")
        sync(directory.parent)


def reclaim(parent: Path) -> None:
    """Clean up the workspaces that dead processes left in `parent`, putting back what they had moved away."""
    for entry in sorted(parent.glob(f"{WORKSPACE}*")):
        if entry.is_symlink() or not entry.is_dir():
            continue
        try:
            handle = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # its owner has just finished
            continue
        try:
            if _try_lock(handle):
                _restore(entry)
                shutil.rmtree(entry, ignore_errors=True)
        finally:
            os.close(handle)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunLock:
    """Hold a directory for this process: `with RunLock(run_dir): ...`; LockError names the process that has it.

    The kernel drops the lock when the process ends, however it ends, so there is never a stale lock to delete by hand.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK
        self._handle: int | None = None

    def __enter__(self) -> Self:
        """Take the lock."""
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        if not _try_lock(handle):
            holder = os.pread(handle, 4096, 0).decode(errors="replace")
            os.close(handle)
            raise LockError(
                f"{self.path.parent} is in use",
                why=f"another process is writing to it: {_describe(holder)}",
                fix="wait until it ends, stop it, or choose another output directory",
                where=str(self.path),
            )
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with disk_errors(self.path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(me).encode(), 0)
        self._handle = handle
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Give it back."""
        if self._handle is not None:
            os.ftruncate(self._handle, 0)  # the file stays: deleting it would let two processes lock two files
            os.close(self._handle)
            self._handle = None


def _describe(holder: str) -> str:
    try:
        found = json.loads(holder)
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "its lock file does not say which"


def _try_lock(handle: int) -> bool:
    """Lock an open file or directory; False if another process has it. True where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


@contextmanager
def _workspace(parent: Path) -> Generator[Path]:
    reclaim(parent)
    work, handle = _claim(parent)
    try:
        yield work
    finally:
        _restore(work)
        shutil.rmtree(work, ignore_errors=True)
        os.close(handle)


def _claim(parent: Path) -> tuple[Path, int]:
    while True:
        work = parent / f"{WORKSPACE}{secrets.token_hex(6)}"
        work.mkdir()
        handle = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        if _try_lock(handle) and work.exists():
            return work, handle
        os.close(handle)  # between mkdir and lock another process took it for a dead one's


def _commit(fresh: Path, target: Path, work: Path) -> None:
    if not os.path.lexists(target):
        fresh.rename(target)
    elif not _exchange(fresh, target):  # two renames: `_restore` undoes the first if the second never happens
        (work / "old").mkdir()
        target.rename(work / "old" / target.name)
        sync(work / "old")
        fresh.rename(target)
    sync(target.parent)


def _restore(work: Path) -> None:
    """Move a replaced directory back if its successor never arrived."""
    for old in (work / "old").glob("*"):
        if not os.path.lexists(work.parent / old.name):
            old.rename(work.parent / old.name)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step (Linux renameat2); False where the system or the file system cannot."""
    rename = _renameat2()
    at_working_directory, exchange = -100, 2
    if rename is None:
        return False
    return rename(at_working_directory, os.fsencode(one), at_working_directory, os.fsencode(other), exchange) == 0


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        function = libc.renameat2
    except AttributeError:  # not Linux, or a C library older than 2018
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function


def _sync_tree(directory: Path) -> None:
    for root, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))
