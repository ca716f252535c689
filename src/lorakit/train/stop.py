"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second stops at once."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from ..core.errors import LorakitError


class Interrupted(LorakitError):
    """The run was asked to stop and has saved where it was. Exits like the signal: 130 or 143."""

    def __init__(self, signum: int, step: int, command: str) -> None:
        name = signal.Signals(signum).name
        super().__init__(
            f"stopped by {name} after step {step}; the run is saved",
            fix=f"run the same command again to go on: {command}",
        )
        self.exit_code = 128 + signum


class StopRequest:
    """Set by the first signal, looked at between micro-batches."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None


@contextmanager
def listen() -> Generator[StopRequest]:
    """Turn SIGINT and SIGTERM into a `StopRequest` inside the block (only in the main thread, as Python allows)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if request:
            raise KeyboardInterrupt
        request.signum = signum

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
