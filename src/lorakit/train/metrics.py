"""The records of a run: `metrics.jsonl` and `samples.jsonl`, one JSON object a line, appended and flushed line by line.

A run that is killed leaves at worst a torn last line. A run that resumes at step k first drops that line and everything
after step k, so the file ends up as if the run had never stopped.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..core.files import atomic_write, disk_errors


class _Log:
    """An append-only file of records that each have a `step`."""

    def __init__(self, path: Path, resume_step: int = 0, *, evaluated: bool = True) -> None:
        self.path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _cut(path, [r for r in read_records(path) if _before(r, resume_step, evaluated)])
            self._file = path.open("a", encoding="utf-8", errors="replace", buffering=1)  # flushed at each line

    def _append(self, record: Mapping[str, Any]) -> None:
        with disk_errors(self.path):
            self._file.write(_line(record))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class MetricsLog(_Log):
    """`metrics.jsonl`: a record per optimizer step and one per evaluation.

    On opening, what is after `resume_step` is dropped (0: everything). `evaluated=False`: so is the evaluation of that
    step itself, because the resumed run will do it again. Raises ResourceError if the disk is full or fails.
    """

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record. A NaN or infinity, which JSON has no number for, is written as null."""
        self._append(record)


class SampleLog(_Log):
    """`samples.jsonl`: {step, prompt, text}, the answers to the fixed prompts. Opened like `MetricsLog`."""

    def write(self, step: int, prompt: str, text: str) -> None:
        """Append one answer."""
        self._append({"step": step, "prompt": prompt, "text": text})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`: an empty list if it does not exist, no torn last line of a run that is being written."""
    return read_records(path) if path.exists() else []


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log file, leaving out lines that are not whole."""
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _before(record: Mapping[str, Any], resume_step: int, evaluated: bool) -> bool:
    if record["step"] == resume_step and not evaluated:
        return "loss" in record
    return record["step"] <= resume_step


def _cut(path: Path, kept: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(map(_line, kept))
    if path.read_bytes() != text.encode():
        atomic_write(path, text)


def _line(record: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"
