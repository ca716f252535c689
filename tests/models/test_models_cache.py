import os
import subprocess
import sys
import threading

import pytest

from lorakit.core.errors import FileError
from lorakit.models.cache import cache_dir, publish


def check(directory):
    if not (directory / "done").is_file() or (directory / "done").read_text() == "damaged":
        raise FileError("not usable")


def build(directory):
    (directory / "data").write_text("x" * 1000)
    (directory / "done").write_text("yes")


def test_the_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LORAKIT_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "lorakit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "lorakit"


def test_a_failed_build_leaves_nothing(tmp_path):
    def fails(directory):
        build(directory)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        publish(tmp_path / "cache" / "model", fails, check)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_killed_build_is_not_seen_and_the_next_one_succeeds(tmp_path):
    target = tmp_path / "model"
    script = f"""
import os
from pathlib import Path
from lorakit.models.cache import publish
def build(directory):
    (directory / "done").write_text("half")
    os._exit(9)
def check(directory):
    if not (directory / "done").exists():
        from lorakit.core.errors import FileError
        raise FileError("no")
publish(Path({str(target)!r}), build, check)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 9
    assert not target.exists()
    assert (publish(target, build, check) / "done").read_text() == "yes"


def test_two_at_once_both_succeed_and_one_copy_stays(tmp_path):
    target, barrier, results = tmp_path / "model", threading.Barrier(8), []

    def slow(directory):
        barrier.wait()  # all eight have found nothing and are building
        build(directory)

    threads = [threading.Thread(target=lambda: results.append(publish(target, slow, check))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [target] * 8
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    check(target)


def test_a_good_directory_is_kept_and_a_damaged_one_replaced(tmp_path):
    target = publish(tmp_path / "model", build, check)
    before = (target / "data").stat().st_ino
    publish(target, build, check)
    assert (target / "data").stat().st_ino == before
    (target / "done").write_text("damaged")
    publish(target, build, check)
    assert (target / "done").read_text() == "yes"


def test_a_cache_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="cannot write the model into the cache") as caught:
        publish(tmp_path / "file" / "model", build, check)
    assert "LORAKIT_CACHE" in caught.value.fix
