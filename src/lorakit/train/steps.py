"""Which rows make up optimizer step k: a pure function, so that resuming needs no state but k."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import DataError
from ..data.order import Plan, epoch_plan, windows


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step, as row indices, and where the run stands after it."""

    epoch: float
    batches: list[list[int]]
    ends_epoch: bool


class Steps:
    """The optimizer steps of a run: `epochs` passes over rows of these lengths, or exactly `max_steps` steps.

    A step takes `accumulate` micro-batches of `batch_size` rows, or of rows that fill `batch_tokens` tokens; the last step
    of an epoch may take fewer.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        seed: int,
        batch_size: int,
        batch_tokens: int | None,
        accumulate: int,
        epochs: float,
        max_steps: int | None,
    ) -> None:
        if not lengths:
            raise DataError("there are no rows to train on")
        self.lengths, self.seed, self.accumulate = lengths, seed, accumulate
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self._epoch = -1
        self._windows: list[Plan] = []
        self.starts = [0]  # first step of each epoch
        whole = math.ceil(epochs) if max_steps is None else 1
        while len(self.starts) <= whole or (max_steps is not None and self.starts[-1] < max_steps):
            self.starts.append(self.starts[-1] + len(self._of_epoch(len(self.starts) - 1)))
        if max_steps is not None:
            self.total = max_steps
        else:
            last = self.starts[whole] - self.starts[whole - 1]
            self.total = self.starts[whole - 1] + math.ceil(round((epochs - (whole - 1)) * last, 9))

    def __getitem__(self, step: int) -> Window:
        epoch = max(e for e, start in enumerate(self.starts) if start <= step)
        windows = self._of_epoch(epoch)
        index = step - self.starts[epoch]
        return Window(epoch + (index + 1) / len(windows), windows[index], index + 1 == len(windows))

    def _of_epoch(self, epoch: int) -> list[Plan]:
        if epoch != self._epoch:
            rows = None if self.batch_tokens else self.batch_size
            plan = epoch_plan(self.seed, epoch, self.lengths, batch_size=rows, batch_tokens=self.batch_tokens)
            self._epoch, self._windows = epoch, windows(plan, self.accumulate)
        return self._windows
