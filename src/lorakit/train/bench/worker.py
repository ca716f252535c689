"""The process of one arm: a job comes in as JSON on stdin, its result goes out as the last line of stdout.

    python -m lorakit.train.bench.worker < job.json

A job is {"arm": "ours" or "peft", "work": the fields of `Work`}.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .clock import Build, measure
from .limit import measure_limit
from .work import Work


def run(job: Mapping[str, Any], build: Build | None = None) -> dict[str, Any]:
    """Do a job; `build` makes the arm in place of the one the job names."""
    work = Work(**job["work"])
    chosen = build or importlib.import_module(f".{job['arm']}", __package__).build
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(chosen, work, Path(scratch))
    if work.limit:
        result["limit"] = measure_limit(work)
    return result


def main() -> None:
    """Do the job on stdin."""
    result = run(json.load(sys.stdin))
    sys.stdout.write(f"\n{json.dumps(result)}\n")


if __name__ == "__main__":
    main()
