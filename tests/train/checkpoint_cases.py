"""Checkpoints whose content tells their step, and children that are killed or fail at the k-th operation on files."""

import contextlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.core import files
from lorakit.train import checkpoint as ck
from lorakit.train.checkpoint import latest, load, save_checkpoint


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


def bytes_of(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


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
