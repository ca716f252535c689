"""A checkpoint is what was saved, or it is recognised as damaged and passed over."""

import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_cases import assert_whole, bytes_of, names, save

from lorakit.core.errors import FileError, UsageError
from lorakit.train import checkpoint as ck
from lorakit.train.checkpoint import latest, load, save_checkpoint, verify


def test_round_trip_of_every_dtype_view_and_alias(tmp_path: Path) -> None:
    flat = torch.randn(24)
    named = {
        "view": flat[3:15].view(3, 4),
        "other_view": flat[15:],
        "transposed": flat.view(4, 6).T,
        "whole": flat,
        "alias": flat,
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        **{
            str(d): torch.ones(3).to(d) for d in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)
        },
    }
    state = {"seed": 2**63 - 1, "loss": 0.1 + 0.2, "best": None, "tail": [1e-300, -0.0], "ü": {"nested": True}}
    path = save_checkpoint(tmp_path, 7, {"a": named}, state, config_hash="abc")
    tensors, read = load(path)
    assert read == state
    for name, value in named.items():
        got = tensors["a"][name]
        assert got.dtype == value.dtype and got.shape == value.shape
        assert bytes_of(got) == bytes_of(value), name
    found = latest(tmp_path)
    assert found is not None
    assert (found.step, found.path, found.config_hash, found.versions["torch"]) == (7, path, "abc", torch.__version__)


def test_loaded_tensors_do_not_follow_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    tensors, _ = load(path)
    (path / "adapter.safetensors").write_bytes(b"\0" * (path / "adapter.safetensors").stat().st_size)
    assert torch.equal(tensors["adapter"]["layer.lora_A"], torch.full((4, 64), 1.0))
    tensors["adapter"]["layer.lora_A"].zero_()  # writable memory of our own


def test_retention_is_by_step_and_leaves_what_is_not_ours(tmp_path: Path) -> None:
    for stray in (
        ".tmp-7",
        "lost+found",
        "step-abc",
        "checkpoint-9",
        "step-99999999999999999999",
        "step-9",
        "step-0000000009",
    ):
        (tmp_path / stray).mkdir()
    (tmp_path / "step-000099").symlink_to(tmp_path)
    strays = names(tmp_path)
    for step in (10, 20, 30, 40):
        path = save(tmp_path, step, keep=2, protect={10})
        os.utime(path, (2_000_000_000 - step, 2_000_000_000 - step))  # the clock says the opposite
    assert names(tmp_path) == sorted([*strays, "step-000010", "step-000030", "step-000040"])
    assert assert_whole(tmp_path) == 40


def test_later_steps_of_a_run_that_went_back_are_dropped(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    save(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["step-000015"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save_checkpoint(tmp_path, 10, {"other": {"x": torch.ones(2)}}, {"again": True})
    assert load(tmp_path / "step-000010")[1] == {"again": True}
    assert names(tmp_path) == ["step-000010"]
    with pytest.raises(UsageError):
        save(tmp_path, 11, keep=0)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path / "missing") is None
    assert latest(tmp_path) is None


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A directory with checkpoints 10 and 20, and the path of 20."""
    save(tmp_path, 10)
    return tmp_path, save(tmp_path, 20)


def test_every_bit_flip_is_detected(two: tuple[Path, Path]) -> None:
    _, newest = two
    rng = random.Random(0)
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        everywhere = range(len(content))
        for position in everywhere if len(content) < 1000 else rng.sample(everywhere, 300):
            flipped = bytearray(content)
            flipped[position] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            assert any(problem.startswith(file.name) for problem in verify(newest)), (file.name, position)
        with pytest.raises(FileError, match="damaged"):
            load(newest)
        file.write_bytes(content)
        assert verify(newest) == []


def damages(newest: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    for file in sorted(newest.iterdir()):
        size = file.stat().st_size
        for length in (0, 1, size // 2, size - 1):
            yield file.name, lambda file=file, length=length: os.truncate(file, length)
        yield file.name, file.unlink
        yield file.name, lambda file=file: (file.unlink(), file.mkdir())
        yield file.name, lambda file=file: (file.rename(file.parent.parent / "away"), file.symlink_to("../away"))
        yield file.name, lambda file=file: shutil.copy(newest.parent / "step-000010" / file.name, file)
    yield ck.MANIFEST, lambda: (newest / ck.MANIFEST).write_text("[" * 100_000)
    yield ck.MANIFEST, lambda: (newest / ck.MANIFEST).write_text("{}")


def test_truncated_missing_swapped_and_linked_files_fall_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "origin", 10)
    newest = save(tmp_path / "origin", 20)
    count = len(list(damages(newest)))
    assert count == 8 * 4 + 2
    for index in range(count):
        directory = tmp_path / f"{index}"
        shutil.copytree(tmp_path / "origin", directory)
        name, damage = list(damages(directory / "step-000020"))[index]
        damage()
        caplog.clear()
        assert assert_whole(directory) == 10, (name, index)
        assert name in caplog.text and "step-000020" in caplog.text
        with pytest.raises(FileError, match="damaged") as caught:
            latest(directory, fallback=False)
        assert caught.value.fix
        with pytest.raises(FileError):
            load(directory / "step-000020")


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_by_again(two: tuple[Path, Path]) -> None:
    directory, newest = two
    (newest / ck.STATE).unlink()
    save(directory, 15, keep=1)  # keep=1 counts the good one
    assert assert_whole(directory) == 15
    save(directory, 20, keep=1)
    assert assert_whole(directory) == 20
    assert names(directory) == ["step-000020"]


def test_a_newer_format_is_refused_not_passed_over(two: tuple[Path, Path]) -> None:
    directory, newest = two
    manifest = json.loads((newest / ck.MANIFEST).read_text())
    del manifest["digest"]
    manifest |= {"format": ck.FORMAT + 1, "versions": {"lorakit": "99.1"}}
    (newest / ck.MANIFEST).write_text(ck._sealed(manifest))
    with pytest.raises(FileError, match=r"99\.1"):
        latest(directory)


def test_a_manifest_cannot_name_files_elsewhere(two: tuple[Path, Path], tmp_path: Path) -> None:
    _, newest = two
    manifest = json.loads((newest / ck.MANIFEST).read_text())
    del manifest["digest"]
    (newest / "state.json").rename(newest.parent / "state.json")
    manifest["files"]["../state.json"] = manifest["files"].pop("state.json")
    (newest / ck.MANIFEST).write_text(ck._sealed(manifest))
    assert verify(newest) == ["manifest.json: damaged"]


def test_warnings_go_to_the_log(two: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    directory, newest = two
    (newest / "rng.safetensors").unlink()
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        latest(directory)
    assert "rng.safetensors: missing" in caplog.text
