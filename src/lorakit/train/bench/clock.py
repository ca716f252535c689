"""Time the steps of an arm, whoever wrote it: processor and wall time, and the memory of the process."""

import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .work import Work, gradients, set_start


class Arm(NamedTuple):
    """One program ready to train: who can take a step.

    step: take one optimizer step on the work's rows; gives the mean loss of a trained token and the gradient's norm
    factors: `<layer path>/lora_A` and `<layer path>/lora_B` -> what is trained
    """

    step: Callable[[], tuple[float, float]]
    optimizer: torch.optim.Optimizer
    factors: Mapping[str, nn.Parameter]


Build = Callable[[Work, Path], Arm]
"""Load the model and attach the adapter; the path is a directory to write in."""


def measure(build: Build, work: Work, scratch: Path) -> dict[str, Any]:
    """Run the work's steps. Gives loss and gradient norm of the first one, seconds of each of the others, bytes."""
    torch.set_num_threads(work.threads)
    arm = build(work, scratch)
    set_start(arm.factors)
    loaded = peak_memory(work.device)
    if work.device == "cuda":  # only what training takes
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loss, norm, first = _first_step(arm, work)
    wall, cpu = [], []
    for _ in range(work.steps):
        seconds = timed(arm.step)  # it gives its loss as a number, so a GPU is at most an update behind when it ends
        wall.append(seconds[0])
        cpu.append(seconds[1])
    return {
        "loss": loss,
        "grad_norm": norm,
        "first_step_wall": first,
        "wall": wall,
        "cpu": cpu,
        "peak_memory": peak_memory(work.device),
        "peak_memory_of_loading": loaded,
        "trainable": sum(p.numel() for p in arm.factors.values()),
        "threads": torch.get_num_threads(),
    }


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Call a function; gives the wall and the processor seconds of all threads it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_memory(device: str = "cpu") -> int:
    """Give the most memory (bytes) held so far: on a GPU what torch has taken of it, recorded passes included.

    On a processor that of this process alone: VmHWM where there is one, which knows no parent.
    """
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _first_step(arm: Arm, work: Work) -> tuple[float, float, float]:
    """Take the step that warms up; its gradients, as the optimizer gets them, go to the file that the work names."""
    if work.gradients is None:
        began = time.perf_counter()
        return *arm.step(), time.perf_counter() - began
    from safetensors.torch import save_file

    kept = {}
    hook = arm.optimizer.register_step_pre_hook(lambda *_: kept.update(gradients(arm.factors)))
    began = time.perf_counter()
    loss, norm = arm.step()
    seconds = time.perf_counter() - began
    hook.remove()
    save_file(kept, work.gradients)
    return loss, norm, seconds
