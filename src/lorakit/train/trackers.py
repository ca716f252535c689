"""Optional copies of a run's records for TensorBoard and trackio. `metrics.jsonl` stays the record that counts.

A tracker that fails in the middle of a run is named once in a warning and then left out; the training goes on.
"""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import UsageError

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where a copy of the records goes."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of a step, named like `train/loss` and `eval/loss`."""
        ...

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record an answer to a fixed prompt."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class TensorBoard:
    """Event files in the run directory: `tensorboard --logdir RUN`."""

    def __init__(self, directory: Path, config: Mapping[str, Any], resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else None)
        self._writer.add_text("config", "    " + json.dumps(config, indent=1, default=str).replace("\n", "\n    "))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Add the answer as a text named by its prompt."""
        self._writer.add_text(f"sample/{prompt[:60]}", text, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class Trackio:
    """A run in trackio's local project `lorakit`, named like the run directory: `trackio show`."""

    def __init__(self, directory: Path, config: Mapping[str, Any], resume_step: int) -> None:
        trackio = import_module("trackio")
        resume = "allow" if resume_step else "never"
        with contextlib.redirect_stdout(sys.stderr):  # it greets on stdout, which is for results
            self._run = trackio.init("lorakit", name=directory.resolve().name, config=dict(config), resume=resume)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of the step."""
        self._run.log(dict(values), step=step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Log the answer as a text named by its prompt."""
        self._run.log({f"sample/{prompt[:60]}": text}, step=step)

    def close(self) -> None:
        """Wait until everything is stored."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


TRACKERS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any], int], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "trackio": ("trackio", Trackio),
}
"""Name -> (the package it needs, how to make it)."""


class Trackers:
    """The trackers of one run, together.

    Raises UsageError for a name that does not exist or whose package is not installed.
    """

    def __init__(
        self, names: Sequence[str], directory: Path, config: Mapping[str, Any] | None = None, *, resume_step: int = 0
    ) -> None:
        require(names)
        self._live: dict[str, Tracker] = {}
        for name in names:
            with self._guarded(name):
                self._live[name] = TRACKERS[name][1](directory, config or {}, resume_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Pass on a record of `metrics.jsonl`; what is not a finite number is left out."""
        values = {_tag(k): float(v) for k, v in record.items() if k != "step" and _is_number(v)}
        for name, tracker in list(self._live.items()):
            with self._guarded(name):
                tracker.write(record["step"], values)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Pass on an answer to a fixed prompt."""
        for name, tracker in list(self._live.items()):
            with self._guarded(name):
                tracker.sample(step, prompt, text)

    def close(self) -> None:
        """End them all."""
        for name, tracker in list(self._live.items()):
            with self._guarded(name):
                tracker.close()
        self._live.clear()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Generator[None]:
        try:
            yield
        except Exception as error:  # whatever goes wrong in a tracker, the training is worth more
            self._live.pop(name, None)
            log.warning("%s failed and is left out from here on: %s: %s", name, type(error).__name__, error)


def require(names: Sequence[str]) -> None:
    """Raise UsageError if a tracker does not exist or cannot be imported; call it before any work is done."""
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"unknown tracker {name!r}", fix=f"there are: {', '.join(TRACKERS)}")
        package = TRACKERS[name][0]
        if find_spec(package) is None:
            raise UsageError(
                f"train.track: {name} needs the package {package!r}, which is not installed",
                fix="pip install 'lorakit[track]'",
            )


def _tag(key: str) -> str:
    return "eval/" + key.removeprefix("eval_") if key.startswith("eval_") else f"train/{key}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
