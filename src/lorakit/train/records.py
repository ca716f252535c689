"""Where a run's records go: its own files, the terminal, and trackers if asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .metrics import MetricsLog, SampleLog
from .progress import Progress
from .trackers import Trackers


class Records:
    """Every record goes to `metrics.jsonl` or `samples.jsonl`, to the progress line and to the trackers.

    resume_step: the step a run goes on from; later records are dropped.
    """

    def __init__(
        self,
        directory: Path,
        progress: Progress,
        *,
        track: Sequence[str],
        config: Mapping[str, Any],
        resume_step: int,
    ) -> None:
        self.metrics = MetricsLog(directory / "metrics.jsonl", resume_step)
        self.samples = SampleLog(directory / "samples.jsonl", resume_step)
        self.trackers = Trackers(track, directory, config, resume_step=resume_step)
        self.progress = progress

    def step(self, record: Mapping[str, Any]) -> None:
        """Record an optimizer step."""
        self.metrics.write(record)
        self.trackers.write(record)
        self.progress.step(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Record an evaluation."""
        self.metrics.write(record)
        self.trackers.write(record)
        self.progress.evaluation(record)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record an answer to a fixed prompt."""
        self.samples.write({"step": step, "prompt": prompt, "text": text})
        self.trackers.sample(step, prompt, text)
        self.progress.sample(prompt, text)

    def close(self) -> None:
        """Flush and end."""
        self.metrics.close()
        self.samples.close()
        self.trackers.close()
