"""The process of one arm of `peers.py`: a job as JSON on stdin, its result as the last line of stdout."""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import _peer_data
import _peer_saved
from _peer_life import LIFE
from _peer_steps import step_arm

DATA = {
    "data lorakit": _peer_data.ours,
    "data PEFT + Trainer": _peer_data.trainer,
    "data TRL": partial(_peer_data.trl, packing=False),
    "data TRL, packed": partial(_peer_data.trl, packing=True),
}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job: its arm is one of those above, `saved X`, or one that takes steps."""
    arm = job["arm"]
    sys.path.extend(job.get("peers", []))  # at the end: what is installed here is not replaced
    with tempfile.TemporaryDirectory() as scratch:
        if arm.startswith("saved "):
            return _peer_saved.saved(job, Path(scratch))
        if arm in LIFE or arm in DATA:
            return (LIFE | DATA)[arm](job, Path(scratch))
        return step_arm(arm)(job)


if __name__ == "__main__":
    result = run(json.load(sys.stdin))
    print(f"\n{json.dumps(result)}")
