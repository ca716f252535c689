"""What the benchmarks share: both sides in fresh processes, one clock, results with all that is needed to read them.

A benchmark prepares a job (a JSON file: data, order of the rows, rates, seeds), runs `SCRIPT --arm ours --job FILE` and
`SCRIPT --arm peft --job FILE`, and compares what they leave beside it. The PEFT side imports nothing of lorakit.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

ARMS = ("ours", "peft")
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "lorakit")


class StepClock:
    """Wall and processor time at the end of every optimizer step of this process, whoever runs the loop."""

    def __init__(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.wall, self.cpu = list[float](), list[float]()
        self._hook = register_optimizer_step_post_hook(self._tick)

    def _tick(self, *_: Any) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def seconds(self, skip: Sequence[int] = ()) -> dict[str, Any]:
        """Stop, and give the time from each step to the next. `skip`: steps (from 0) that came after an evaluation."""
        self._hook.remove()
        steps = [i for i in range(1, len(self.wall)) if i not in skip]
        wall = [self.wall[i] - self.wall[i - 1] for i in steps]
        cpu = [self.cpu[i] - self.cpu[i - 1] for i in steps]
        return {
            "timed_steps": steps,
            "step_wall_median": median(wall),
            "step_cpu_median": median(cpu),
            "wall": sum(wall),
            "cpu": sum(cpu),
        }


def peak_memory() -> int | None:
    """Give the most memory (bytes) this process has held so far: VmHWM, which knows nothing of a parent. Linux only."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return int(found[1]) * 1024 if found else None


def parser(doc: str | None, data: str) -> argparse.ArgumentParser:
    """Give the options that every benchmark has."""
    options = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    options.add_argument("--data", type=Path, help=data)
    options.add_argument(
        "--output", type=Path, default=RESULTS, help="directory for the results (default: results/ beside this file)"
    )
    options.add_argument("--model", help="model in place of the benchmark's own")
    options.add_argument("--tiny", action="store_true", help="a few rows and steps: does it run and agree?")
    options.add_argument("--seeds", type=int, nargs="+", default=[0], help="one comparison for each")
    options.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return options


def run_arm(arm: str, job: Path) -> None:
    """Run one side of this script in a process of its own. Raises SystemExit with the end of its output if it fails."""
    command = [sys.executable, sys.argv[0], "--arm", arm, "--job", str(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{arm} failed with exit code {done.returncode}:\n{done.stdout[-4000:]}")


def serve_arm(
    options: argparse.Namespace, arms: Mapping[str, Callable[[dict[str, Any], Path], dict[str, Any]]]
) -> None:
    """Do the work of the process that `run_arm` started; its result is `<arm>.json` beside the job."""
    job = json.loads(options.job.read_text())
    result = arms[options.arm](job, options.job.parent)
    write_json(options.job.parent / f"{options.arm}.json", result)


def compare(make_job: Callable[[int, Path], dict[str, Any]], seeds: Sequence[int], work: Path) -> list[dict[str, Any]]:
    """Run both sides for every seed, the one that goes first alternating. Gives {"seed", "order", "ours", "peft"}s."""
    runs = []
    for turn, seed in enumerate(seeds):
        directory = work / f"seed-{seed}"
        directory.mkdir()
        job = make_job(seed, directory)
        write_json(directory / "job.json", job)
        order = ARMS if turn % 2 == 0 else ARMS[::-1]
        for arm in order:
            print(f"seed {seed}: {arm} ...", file=sys.stderr, flush=True)
            run_arm(arm, directory / "job.json")
        results = {arm: json.loads((directory / f"{arm}.json").read_text()) for arm in ARMS}
        runs.append({"seed": seed, "order": list(order), **results})
    return runs


def agreement(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Compare two loss curves step by step."""
    gaps = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return {
        "first_step_relative": gaps[0],
        "largest_relative": max(gaps),
        "at_step": gaps.index(max(gaps)) + 1,
        "mean_relative": sum(gaps) / len(gaps),
    }


def environment() -> dict[str, Any]:
    """Give versions, hardware, threads and what else the machine was doing: what the figures were measured with."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _git("describe", "--always", "--dirty", "--abbrev=10"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "processors_visible": os.cpu_count(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def write_json(path: Path, content: Any) -> None:
    """Write JSON that a person can read."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_results(name: str, directory: Path, content: dict[str, Any], markdown: str) -> Path:
    """Write `<name>_<hardware>_<date>.json` and `.md`. Gives the path of the latter."""
    where = content["environment"]
    words = re.findall(r"[a-z0-9]+", (where["gpu"] or where["processor"]).lower())[:4]
    stem = f"{name}_{'-'.join(words)}-{where['threads']}t_{where['date']}"
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / f"{stem}.json", content)
    (directory / f"{stem}.md").write_text(markdown)
    return directory / f"{stem}.md"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Give a Markdown table that also reads well on a terminal."""
    columns = [[head, *cells] for head, cells in zip(header, zip(*rows, strict=True), strict=True)]
    widths = [max(map(len, column)) for column in columns]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def measured_with(environment: Mapping[str, Any]) -> str:
    """Give the line of a report that says what the figures were measured with."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    place = environment["gpu"] or f"{environment['processor']} ({environment['processors_visible']} cores visible)"
    return (
        f"{environment['date']}, {place}, {environment['threads']} thread(s), load average {environment['load_average']} "
        f"before the first run (above the number of threads the machine was shared: compare CPU times); Python {environment['python']}, "
        f"{versions}, commit {environment['commit']}.\n"
    )


def megabytes(size: int | None) -> str:
    """Write a number of bytes in MB."""
    return "-" if size is None else f"{size / 1e6:,.0f} MB"
