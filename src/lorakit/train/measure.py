"""Memory in use, for the log, and memory that is free."""

import resource
import sys

import torch

from ..core.machine import memory_available


def memory_gb() -> float:
    """Give the peak memory of this process in GB (10^9 bytes): the GPU's if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def free_memory(device: torch.device) -> int:
    """Give the bytes that this process can still get at `device`; 0 if the system does not say."""
    if device.type != "cuda":
        return memory_available()
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
