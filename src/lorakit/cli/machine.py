"""What this process may really use: processor cores (affinity, container quota) and memory (container limit)."""

import os
from pathlib import Path

from ..core.machine import CGROUP, memory_available, memory_limit, number

__all__ = ["CGROUP", "cores", "memory_available", "memory_limit", "set_threads", "wait_politely"]


def cores(cgroup: Path = CGROUP) -> int:
    """Give the number of processor cores this process may keep busy, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, min(allowed, round(quota) if quota else allowed))


def wait_politely() -> None:
    """Let threads that wait for each other sleep; has to be called before torch is imported.

    OpenMP's default is to wait in a busy loop. Alone on a machine that gains little; beside another busy process it
    burns the cores that the other threads need (measured on two shared cores: twice the time, twice the work).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def set_threads() -> int:
    """Let torch use the cores there are, no more; OMP_NUM_THREADS wins. Gives the number of threads."""
    import torch

    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(min(torch.get_num_threads(), cores()))
    return torch.get_num_threads()


def _quota(cgroup: Path) -> float:
    """Give the cores that the container's quota allows, of version 2 or 1; 0 for no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota, period = (str(number(cgroup / "cpu" / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    if quota == "max" or int(quota) <= 0 or int(period) <= 0:
        return 0.0
    return int(quota) / int(period)
