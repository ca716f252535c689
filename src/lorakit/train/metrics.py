"""The records of a run: `metrics.jsonl` and `samples.jsonl`, one JSON object a line, appended and flushed line by line.

A run that is killed leaves at worst a torn last line. A run that resumes at step k first drops that line and everything
after step k, so the file ends up as if the run had never stopped.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..core.files import atomic_write, disk_errors


class MetricsLog:
    """`metrics.jsonl`: a record per optimizer step and one per evaluation, each with its `step`.

    On opening, what is after `resume_step` is dropped (0: everything). Raises ResourceError if the disk is full.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [r for r in read_metrics(path) if r["step"] <= resume_step]
            whole = "".join(map(_line, kept)).encode()
            if path.exists() and path.read_bytes() != whole:
                atomic_write(path, whole)
            self._file = path.open("a", encoding="utf-8", errors="replace", buffering=1)  # flushed at each line
        self._again = {_identity(r) for r in kept if r["step"] == resume_step}

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record. A NaN or infinity, which JSON has no number for, is written as null.

        An evaluation of the step that was resumed at is left out if it is in the file already: a run that was killed
        between evaluating and saving evaluates again.
        """
        if _identity(record) not in self._again:
            with disk_errors(self.path):
                self._file.write(_line(record))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class SampleLog(MetricsLog):
    """`samples.jsonl`: {step, prompt, text}, the answers to the fixed prompts."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log file; none if there is no file. A line that is not whole is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # torn by a kill, or being written right now
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _identity(record: Mapping[str, Any]) -> tuple[int, bool, str | None]:
    return record["step"], "loss" in record, record.get("prompt")


def _line(record: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"
