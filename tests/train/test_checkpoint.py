"""A checkpoint is whole or it is passed over: bit flips, truncation, kills at every stage, full and failing disks."""

import contextlib
import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorakit.core import files
from lorakit.core.errors import FileError, LockError, ResourceError, UsageError
from lorakit.core.files import WORKSPACE, RunLock, atomic_directory, atomic_write
from lorakit.train import checkpoint as ck
from lorakit.train.checkpoint import latest, load, optimizer_tensors, restore_optimizer, save_checkpoint, verify


def tensors_of(step: int, size: int = 64) -> dict[str, dict[str, Tensor]]:
    return {
        "adapter": {"layer.lora_A": torch.full((4, size), float(step)), "layer.lora_B": torch.arange(size) + step},
        "rng": {"torch": torch.full((32,), step % 256, dtype=torch.uint8)},
    }


def save(directory: Path, step: int, size: int = 64, **options: object) -> Path:
    return save_checkpoint(directory, step, tensors_of(step, size), {"step": step, "loss": 0.1 * step}, **options)


def assert_whole(directory: Path, size: int = 64) -> int:
    """The newest checkpoint is all of one step; give that step."""
    found = latest(directory)
    assert found is not None
    tensors, state = load(found.path)
    expected = tensors_of(found.step, size)
    assert state == {"step": found.step, "loss": 0.1 * found.step}
    assert tensors.keys() == expected.keys()
    for stem, named in expected.items():
        assert tensors[stem].keys() == named.keys()
        assert all(torch.equal(tensors[stem][name], value) for name, value in named.items())
    return found.step


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: tests that flush a thousand times need no real disk to be true."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as directory:
        yield Path(directory)


def bytes_of(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


# --- what is written is what is read ------------------------------------------------------------------------------


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


# --- retention ----------------------------------------------------------------------------------------------------


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


# --- damage -------------------------------------------------------------------------------------------------------


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
    manifest["files"]["../step-000010/state.json"] = manifest["files"].pop("state.json")
    (newest / ck.MANIFEST).write_text(ck._sealed(manifest))
    assert verify(newest)


# --- kill -9 ------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child; give its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child touches nothing that another thread may hold
        child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)  # a pool of threads does not survive a fork
            work()
            code = 0
        os._exit(code)
    return child


def ended(child: int) -> int:
    """Wait; give the signal that killed the child, or 0 if it ended well."""
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def fire_at(k: int, fault: Callable[[], object], patch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Let the k-th operation on the file system fail; the result tells whether it has."""
    count = 0

    def wrap(original: Callable) -> Callable:
        def counted(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == k:
                fault()
            return original(*args, **kwargs)

        return counted

    for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir"):
        patch.setattr(os, name, wrap(getattr(os, name)))
    patch.setattr(files, "_exchange", wrap(files._exchange))
    patch.setattr(ck, "save_file", wrap(ck.save_file))
    return lambda: count >= k


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


# --- disks that are full or fail ----------------------------------------------------------------------------------


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


# --- files and locks ----------------------------------------------------------------------------------------------


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


# --- the optimizer's state ----------------------------------------------------------------------------------------


class Float32Momentum(torch.optim.Optimizer):
    """Keeps its state in float32 for parameters in bfloat16, and things that are not tensors."""

    def __init__(self, parameters: object, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.5, 0.25), "note": None})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            assert isinstance(group["betas"], tuple)
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("mean", torch.zeros_like(p, dtype=torch.float32)).lerp_(p.grad.float(), 0.3)
                state["history"] = (*state.get("history", ()), [state["mean"].clone(), 1])[-2:]
                p.sub_(group["lr"] * state["mean"] + sum(m.sum() * w for m, w in state["history"]) * 1e-3)


OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw foreach amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS([q for _, q in p], lr=1e-1, max_iter=3),
    "float32 momentum": Float32Momentum,
}


def model_and_optimizer(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model = model.bfloat16() if name == "float32 momentum" else model
    return model, OPTIMIZERS[name](list(model.named_parameters()))


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            x = torch.linspace(-1, 1, 60, dtype=model[0].weight.dtype).view(10, 6) * (1 + step / 10)
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_training_after_a_restored_optimizer_is_bit_identical(name: str, tmp_path: Path) -> None:
    whole, optimizer = model_and_optimizer(name)
    advance(whole, optimizer, 0, 9)

    first, optimizer = model_and_optimizer(name)
    advance(first, optimizer, 0, 4)
    state, scalars = optimizer_tensors(optimizer)
    assert state
    path = save_checkpoint(tmp_path, 4, {"optimizer": state, "model": first.state_dict()}, {"optimizer": scalars})

    tensors, read = load(path)
    second, optimizer = model_and_optimizer(name)
    second.load_state_dict(tensors["model"])
    restore_optimizer(optimizer, tensors["optimizer"], read["optimizer"])
    advance(second, optimizer, 4, 9)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_restored_optimizer_shares_no_memory_with_its_source() -> None:
    model, optimizer = model_and_optimizer("adamw")
    advance(model, optimizer, 0, 2)
    tensors, scalars = optimizer_tensors(optimizer)
    other_model, other = model_and_optimizer("adamw")
    restore_optimizer(other, tensors, scalars)
    before = {k: v.clone() for k, v in tensors.items()}
    advance(other_model, other, 2, 4)
    assert all(torch.equal(v, tensors[k]) for k, v in before.items())


def test_state_of_other_parameters_is_refused() -> None:
    model, optimizer = model_and_optimizer("adamw")
    advance(model, optimizer, 0, 2)
    tensors, scalars = optimizer_tensors(optimizer)
    only_weights = torch.optim.AdamW([(n, p) for n, p in model.named_parameters() if n != "1.bias"])
    with pytest.raises(FileError, match=r"1\.bias"):
        restore_optimizer(only_weights, tensors, scalars)
    reordered = torch.optim.AdamW(list(model.named_parameters())[::-1])
    with pytest.raises(FileError, match="order"):
        restore_optimizer(reordered, tensors, scalars)


def test_warnings_go_to_the_log(two: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    directory, newest = two
    (newest / "rng.safetensors").unlink()
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        latest(directory)
    assert "rng.safetensors: missing" in caplog.text
