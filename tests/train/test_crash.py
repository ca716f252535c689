"""Kills, full disks and failing disks at every stage of a save: what is left is a whole checkpoint, old or new."""

import errno
import os
import random
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_cases import assert_whole, ended, fire_at, forked, names, save
from torch import Tensor

from lorakit.core import files
from lorakit.core.errors import ResourceError
from lorakit.train import checkpoint as ck
from lorakit.train.checkpoint import verify


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: tests that flush a thousand times need no real disk to be true."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as directory:
        yield Path(directory)


def half_written(named: dict[str, Tensor], path: Path) -> None:
    path.write_bytes(b"\x40\0\0\0\0\0\0\0{")
    os.kill(os.getpid(), signal.SIGKILL)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("exchange", [True, False])
def test_kill_at_every_operation_leaves_a_whole_checkpoint(
    memory_disk: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # a file system without renameat2(RENAME_EXCHANGE)
        monkeypatch.setattr(files, "_renameat2", lambda: None)

    def work(directory: Path, k: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            fire_at(k, die, patch)
            save(directory, 20, keep=1)
            save(directory, 20, keep=1)  # replaces

    seen = set()
    for k in range(1, 1000):
        directory = memory_disk / f"{k}"
        save(directory, 10)
        killed = ended(forked(lambda directory=directory, k=k: work(directory, k)))
        seen.add(assert_whole(directory))
        assert all(verify(path) == [] for path in ck.steps(directory).values())  # none half deleted either
        save(directory, 30, keep=1)  # the same program goes on without help
        assert names(directory) == ["step-000030"]
        if not killed:
            break
    assert k > 40
    assert seen == {10, 20}


def test_kill_inside_the_write_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    monkeypatch.setattr(ck, "save_file", half_written)
    assert ended(forked(lambda: save(tmp_path, 20))) == signal.SIGKILL
    assert len(names(tmp_path)) == 2  # the half-written workspace
    assert assert_whole(tmp_path) == 10
    assert names(tmp_path) == ["step-000010"]
    monkeypatch.undo()
    save(tmp_path, 20)
    assert names(tmp_path) == ["step-000010", "step-000020"]


def test_kill_at_random_instants(memory_disk: Path) -> None:
    rng = random.Random(1)
    size, step, kills = 20_000, 1, 0
    save(memory_disk, step, size)

    def work(ready: int, start: int) -> None:
        os.write(ready, b"!")
        for later in range(start + 1, start + 10_000):
            save(memory_disk, later, size, keep=1)

    for _ in range(40):
        reader, writer = os.pipe()
        child = forked(lambda writer=writer, step=step: work(writer, step))
        os.read(reader, 1)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        kills += ended(child) == signal.SIGKILL
        os.close(reader)
        os.close(writer)
        now = assert_whole(memory_disk, size)
        assert now >= step
        step = now
    assert kills == 40
    assert step > 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_failure_of_every_operation_is_reported_and_leaves_a_whole_checkpoint(memory_disk: Path, code: int) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    reported = 0
    for k in range(1, 1000):
        directory = memory_disk / f"{k}"
        save(directory, 10)
        with pytest.MonkeyPatch.context() as patch:
            fired = fire_at(k, fail, patch)
            try:
                save(directory, 20, keep=1)
            except ResourceError as error:
                assert error.fix and error.why
                reported += 1
                if not (directory / "step-000020").exists():
                    assert (directory / "step-000010").exists()
        assert assert_whole(directory) in (10, 20)
        save(directory, 30, keep=1)
        assert names(directory) == ["step-000030"]
        if not fired():
            break
    assert reported > 15


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", mount], check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_full_disk_keeps_the_old_checkpoint(small_disk: Path) -> None:
    size = 40_000  # about 1 MB each
    save(small_disk, 10, size, keep=1)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_500_000))
    with pytest.raises(ResourceError) as caught:
        save(small_disk, 20, size, keep=1)
    assert "space" in str(caught.value) and caught.value.exit_code == 5
    assert names(small_disk) == ["ballast", "step-000010"]
    assert assert_whole(small_disk, size) == 10
    ballast.unlink()
    save(small_disk, 20, size, keep=1)
    assert assert_whole(small_disk, size) == 20


def test_file_size_limit_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    size = 40_000
    save(tmp_path, 10, size, keep=1)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        with pytest.raises(ResourceError, match="cannot write"):
            save(tmp_path, 20, size, keep=1)

    assert ended(forked(work)) == 0
    assert names(tmp_path) == ["step-000010"]
    assert assert_whole(tmp_path, size) == 10
