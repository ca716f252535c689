"""Atomic files and directories, workspaces of the dead and the living, locks."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest
from checkpoint_cases import ended, forked, names

from lorakit.core import files
from lorakit.core.errors import FileError, LockError, ResourceError
from lorakit.core.files import WORKSPACE, RunLock, atomic_directory, atomic_write


@pytest.mark.parametrize("exchange", [True, False])
def test_an_error_inside_the_block_leaves_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_renameat2", lambda: None)
    target = tmp_path / ("name " + "x" * 240 + " é")
    with atomic_directory(target) as fresh:
        (fresh / "sub").mkdir()
        (fresh / "sub" / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_directory(target) as fresh:
        (fresh / "file").write_text("new")
        1 / 0  # noqa: B018
    assert (target / "sub" / "file").read_text() == "old"
    assert names(tmp_path) == [target.name]
    with atomic_directory(target) as fresh:
        (fresh / "file").write_text("new")
    assert names(target) == ["file"]
    assert names(tmp_path) == [target.name]


def test_every_file_and_directory_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        order.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        real_fsync(handle)

    def rename(one: Path, other: Path) -> None:
        order.append("rename")
        real_rename(one, other)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with atomic_directory(tmp_path / "target") as fresh:
        (fresh / "sub").mkdir()
        (fresh / "sub" / "inner").write_text("x")
        (fresh / "outer").write_text("x")
    assert order == ["inner", "sub", "outer", "new", "rename", tmp_path.name]


def test_a_living_process_keeps_its_workspace_a_dead_one_loses_it(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "mine") as fresh:
        child = forked(lambda: files._claim(tmp_path))  # ends without cleaning up
        assert ended(child) == 0
        assert len(list(tmp_path.glob(f"{WORKSPACE}*"))) == 2
        files.reclaim(tmp_path)
        assert [p.name for p in tmp_path.glob(f"{WORKSPACE}*")] == [fresh.parent.name]
    assert names(tmp_path) == ["mine"]


def test_atomic_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    atomic_write(path, "größe: 1\n")
    assert path.read_bytes() == "größe: 1\n".encode()
    atomic_write(path, b"\0\1")

    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError):
        atomic_write(path, "new")
    assert path.read_bytes() == b"\0\1"
    assert names(tmp_path) == ["config.yaml"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_a_file_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match="permission"):
        atomic_write(tmp_path / "x", "y")


def test_a_lock_names_its_holder_and_ends_with_the_process(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def hold() -> None:
        with RunLock(tmp_path):
            os.write(writer, b"!")
            time.sleep(60)

    child = forked(hold)
    os.read(reader, 1)
    with pytest.raises(LockError, match=f"process {child} on ") as caught, RunLock(tmp_path):
        pass
    assert caught.value.exit_code == 7
    os.kill(child, signal.SIGKILL)
    ended(child)
    with RunLock(tmp_path), pytest.raises(LockError, match=str(os.getpid())), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass
