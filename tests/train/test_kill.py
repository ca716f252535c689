"""The real command, killed at random: the same command again always goes on, and ends with the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def command(model: Path, data: Path, output: Path) -> list[str]:
    flags = {
        "model": model,
        "data": data,
        "output": output,
        "r": 4,
        "lr": 1e-3,
        "epochs": 3,
        "save-steps": 2,
        "valid": 0.2,
    }
    more = ["--dropout", "0.1", "--batch-size", "3", "--accumulate", "2", "--eval-steps", "5", "--dtype", "float32"]
    arguments = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    return [sys.executable, "-m", "lorakit", "train", *arguments, *more]


def losses(directory: Path) -> list[tuple[int, float | None, float | None]]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in records]


def run(arguments: list[str], seconds: float | None = None, number: int = signal.SIGKILL) -> int:
    """Run the command; after `seconds` send it the signal. Gives its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        process.communicate()
    return process.returncode


@pytest.mark.slow
def test_killed_at_random_the_same_command_finishes_the_same_run(
    tiny_model: Path, rows: Callable[..., Path], tmp_path: Path
) -> None:
    data = rows(60)
    began = time.monotonic()
    assert run(command(tiny_model, data, tmp_path / "whole")) == 0
    whole = time.monotonic() - began
    arguments, draw, kills = command(tiny_model, data, tmp_path / "killed"), random.Random(0), 0
    codes = set()
    for _ in range(60):
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        code = run(arguments, draw.uniform(0.3, 1.0) * whole, number)
        codes.add(code)
        if code == 0:
            break
        kills += 1
    assert code == 0, f"not finished after {kills} kills"
    assert kills >= 3
    # -9, -15, -2: ended by the signal itself, before training began; 143, 130: saved first
    assert codes <= {0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 143, 130}
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    file = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_first(
    tiny_model: Path, rows: Callable[..., Path], tmp_path: Path, number: int, code: int
) -> None:
    """Sent as soon as the first step is in the log, so that it meets the training and not the start."""
    arguments = [*command(tiny_model, rows(60), tmp_path / "run"), "--max-steps", "5000", "--save-steps", "0"]
    arguments = [a for i, a in enumerate(arguments) if a != "--epochs" and arguments[i - 1] != "--epochs"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log, limit = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    assert "run the same command again" in said
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1
