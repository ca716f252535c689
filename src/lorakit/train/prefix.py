"""Which rows a run keeps the frozen prefix of (`models/prefix.py`), and in which groups: those of its first epoch."""

from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

from ..core.errors import UsageError
from ..models.prefix import KEY, Prefix, below, frozen_blocks
from .loop import Job
from .shares import share_out, threads_each
from .task import LanguageModelling


@contextmanager
def kept_prefix(job: Job, shares: int) -> Generator[Prefix]:
    """Let the job's task begin its passes at the lowest adapted block, inside the block of `with`.

    shares: into how many the rows of a micro-batch are dealt out. Jobs that share a task share its prefix. Raises UsageError
    where there is nothing to keep or it would not be exact, ResourceError where the disk has no room.
    """
    task = job.task
    if not isinstance(task, LanguageModelling) or not task.packed:
        raise UsageError(
            f"{KEY} works with packed causal models only",
            why="this model takes one row at a time, or a padded batch of them",
            fix=f"leave {KEY} out",
        )
    model: Any = job.model
    first = task.prefix is None
    prefix = task.prefix or Prefix(model, frozen_blocks(model), job.directory)
    try:
        _expect(prefix, job, shares)
        prefix.check_room()
        task.prefix = prefix
        yield prefix
    finally:
        if first:
            task.prefix = None
            prefix.close()


def _expect(prefix: Prefix, job: Job, shares: int) -> None:
    """Announce the passes of the first epoch, in which each row is once."""
    for step in range(job.steps.starts[1]):
        for batch in job.steps[step].batches:
            rows = [job.examples[i].input_ids for i in batch]
            parts = share_out([len(row) for row in rows], shares)
            for part in parts:
                prefix.expect([rows[i] for i in part], threads_each(len(parts)))


def advice(job: Job) -> str | None:
    """Say what could be kept, of a run that goes through its rows twice or more."""
    model: Any = job.model
    if job.steps.total >= 2 * job.steps.starts[1] and isinstance(job.task, LanguageModelling) and job.task.packed:
        with suppress(UsageError):
            return f"{KEY}: true would run {below(frozen_blocks(model))} in the first epoch only"
    return None
