"""Memory in use, for the log."""

import resource
import sys

import torch


def memory_gb() -> float:
    """Give the peak memory of this process in GB (10^9 bytes): the GPU's if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
