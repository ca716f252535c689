"""How many threads do torch's operations."""

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def threads(count: int) -> Generator[None]:
    """Let the operations that the calling thread asks for be done by `count` threads, inside the block of `with`.

    How they divide a product decides how it is rounded.
    """
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)
