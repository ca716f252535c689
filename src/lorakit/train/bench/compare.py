"""Run arms in fresh processes, one after the other in alternating order; give medians, ratios, and whether they agree."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

from ...core.errors import CheckError, LorakitError
from .agree import agreement, read_step
from .work import Work

WORKER = (sys.executable, "-m", "lorakit.train.bench.worker")
Say = Callable[[str], None]


class Spread(NamedTuple):
    """Quartiles of a sample."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Give the quartiles, interpolated between the values; of one value thrice that value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*quantiles(values, n=4, method="inclusive"))


def ratio(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> Spread:
    """Give the spread of a/b over all pairs of samples of the same round (they were taken close together in time)."""
    return spread([a / b for ours, theirs in zip(above, below, strict=True) for a in ours for b in theirs])


def compare(
    work: Work,
    *,
    peer: str | None = "peft",
    runs: int = 3,
    say: Say = print,
    command: Sequence[str] = WORKER,
    reference: bool = True,
) -> dict[str, Any]:
    """Measure `ours`, and beside it a peer. Gives plain values for JSON: per arm figures and raw runs, ratios, agreement.

    In bfloat16 both are held against one step of the peer in float32; without `reference`, for models that do not fit in
    float32, only the relative difference of the losses is given. Raises LorakitError if a process fails.
    """
    arms = ["ours", *([peer] if peer else [])]
    with tempfile.TemporaryDirectory() as directory:
        files = {arm: Path(directory, f"{arm}.safetensors") for arm in (*arms, "reference")}
        jobs = {arm: job(arm, replace(work, gradients=str(files[arm]), limit=True)) for arm in arms}
        results = alternate(jobs, runs, say, command)
        found: dict[str, Any] = {"work": asdict(work), "arms": {arm: figures(work, results[arm]) for arm in arms}}
        if peer:
            first = {arm: read_step(results[arm][0], files[arm]) for arm in arms}
            found["ratios"] = ratios(results["ours"], results[peer])
            found["loss_off"] = abs(first["ours"].loss / first[peer].loss - 1)
            if work.dtype == "bfloat16" and not reference:
                return found
            true = None
            if work.dtype == "bfloat16":
                say(f"{peer} in float32, for the true gradients")
                exact = replace(work, dtype="float32", steps=0, gradients=str(files["reference"]), limit=False)
                true = read_step(run_arm(job(peer, exact), command), files["reference"])
            found["agreement"] = agreement(first["ours"], first[peer], true)
    return found


def job(arm: str, work: Work) -> dict[str, Any]:
    """Give what a worker reads."""
    return {"arm": arm, "work": asdict(work)}


def alternate(
    jobs: Mapping[str, Mapping[str, Any]], runs: int, say: Say, command: Sequence[str] = WORKER
) -> dict[str, list[dict[str, Any]]]:
    """Do every job `runs` times; every other round begins with the last arm. Gives the results in order of rounds."""
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in jobs}
    for turn in range(runs):
        for arm in list(jobs)[:: 1 if turn % 2 == 0 else -1]:
            say(f"{arm}, run {turn + 1} of {runs}")
            results[arm].append(run_arm(jobs[arm], command))
    return results


def run_arm(job: Mapping[str, Any], command: Sequence[str] = WORKER) -> dict[str, Any]:
    """Do a job in a process of its own. Raises LorakitError with the end of its output if it fails."""
    threads = {"OMP_NUM_THREADS": str(job["work"]["threads"])}
    waiting = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}  # threads that spin count as work done
    began = time.perf_counter()
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, env={**os.environ, **threads, **waiting}
    )
    if done.returncode:
        raise LorakitError(f"the arm {job['arm']} failed", why="\n".join(done.stderr.strip().splitlines()[-12:]))
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**result, "process_wall": time.perf_counter() - began}


def figures(work: Work, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Give an arm's medians with quartiles over all timed steps, and its raw runs."""
    wall, cpu = ([seconds for run in runs for seconds in run[kind]] for kind in ("wall", "cpu"))
    found: dict[str, Any] = {
        "tokens_per_second": spread([work.tokens / seconds for seconds in wall]),
        "wall_per_step": spread(wall),
        "cpu_per_step": spread(cpu),
        "peak_memory": spread([run["peak_memory"] for run in runs]),
    }
    if all("limit" in run for run in runs):
        found["share_of_limit"] = spread([run["limit"]["seconds"] / s for run in runs for s in run["wall"]])
        found["gflops"] = spread([run["limit"]["rate"] / 1e9 for run in runs])
    return {**found, "runs": list(runs)}


def ratios(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """Give ours/peer of speed (above 1 is better), processor time and memory (below 1 is better)."""
    wall, cpu = (ratio([r[kind] for r in ours], [r[kind] for r in theirs]) for kind in ("wall", "cpu"))
    memory = ratio([[r["peak_memory"]] for r in ours], [[r["peak_memory"]] for r in theirs])
    speed = Spread(1 / wall.high, 1 / wall.median, 1 / wall.low)
    return {"tokens_per_second": speed, "cpu_per_step": cpu, "peak_memory": memory}


def require_agreement(found: Mapping[str, Any], peer: str) -> None:
    """Raise CheckError with every measure that is too far off."""
    if not found["agrees"]:
        off = [
            f"{name} differs by {m['error']:.1e}, allowed is {m['allowed']:.1e}"
            for name, m in found["measures"].items()
            if not m["error"] <= m["allowed"]
        ]
        raise CheckError(f"lorakit and {peer} did not compute the same: {'; '.join(off)}", why=found["against"])
