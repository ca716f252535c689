"""What this process may really use: processor cores (affinity, container quota) and memory (container limit)."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cores(cgroup: Path = CGROUP) -> int:
    """Give the number of processor cores this process may keep busy, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, min(allowed, round(quota) if quota else allowed))


def memory_limit(cgroup: Path = CGROUP) -> int:
    """Give the bytes of memory this process may use, as far as the system says; 0 if it does not."""
    limits = [_number(cgroup / "memory.max"), _number(cgroup / "memory" / "memory.limit_in_bytes"), _physical()]
    return min((limit for limit in limits if 0 < limit < 2**60), default=0)


def memory_available(cgroup: Path = CGROUP) -> int:
    """Give the bytes of memory that are free for this process now; 0 if the system does not say."""
    free = _meminfo("MemAvailable")
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if 0 < limit < 2**60 and used:
        return max(0, min(free, limit - used))
    return free


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
        quota, period = (str(_number(cgroup / "cpu" / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    if quota == "max" or int(quota) <= 0 or int(period) <= 0:
        return 0.0
    return int(quota) / int(period)


def _number(file: Path) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return 0


def _physical() -> int:
    return _meminfo("MemTotal")


def _meminfo(field: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
