"""The memory this process may really use: the machine's, or what its container allows."""

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def memory_limit(cgroup: Path = CGROUP) -> int:
    """Give the bytes of memory this process may use, as far as the system says; 0 if it does not."""
    limits = [number(cgroup / "memory.max"), number(cgroup / "memory" / "memory.limit_in_bytes"), _physical()]
    return min((limit for limit in limits if 0 < limit < 2**60), default=0)


def memory_available(cgroup: Path = CGROUP) -> int:
    """Give the bytes of memory that are free for this process now; 0 if the system does not say."""
    free = _meminfo("MemAvailable")
    limit, used = number(cgroup / "memory.max"), number(cgroup / "memory.current")
    if 0 < limit < 2**60 and used:
        return max(0, min(free, limit - used))
    return free


def number(file: Path) -> int:
    """Read a file that holds one number; 0 if it is absent or holds anything else, such as "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0


def _physical() -> int:
    return _meminfo("MemTotal")


def _meminfo(field: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
