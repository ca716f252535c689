"""The rows of the table: which arms, on what, and which figures of theirs are held against each other."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.train.bench.compare import Spread, alternate, ratio, run_arm, spread
from lorakit.train.bench.work import Work

WORKER = (sys.executable, str(Path(__file__).with_name("_peer_worker.py")))
TRL_LIMIT = 2e-3  # relative, of the mean loss of a pass in bfloat16, logged to four digits
ROUNDING = 2.0**-7  # relative, of the loss of one step: two programs, each off by a rounding of bfloat16
EXACT = 1e-4


@dataclass(frozen=True)
class Options:
    """What the rows are run with; `model` is a directory, `peers` a directory with trl and its kin."""

    model: str
    scratch: Path
    threads: int
    quick: bool
    data: Path | None
    peers: Path | None
    rows: int

    def work(self, **fields: Any) -> Work:
        """Give the work of a step row; a quick one has few and short rows."""
        if self.quick:
            fields |= {"batch": 1, "length": 32, "steps": 1}
        return Work(**{"model": self.model, "dtype": "bfloat16", "threads": self.threads, "steps": 3, **fields})


@dataclass(frozen=True)
class Target:
    """What a figure should come to: at least or at most `value`; of the ratio ours/peer, or of our own figure."""

    value: float
    most: bool = False
    own: bool = False

    def __str__(self) -> str:
        return f"{'ours' if self.own else 'ratio'} {'<=' if self.most else '>='} {self.value:g}"

    def reached(self, found: float) -> bool:
        """Whether the median keeps to it."""
        return found <= self.value if self.most else found >= self.value


def line(
    figure: str,
    ours: Sequence[Sequence[float]],
    peer: str | None = None,
    theirs: Sequence[Sequence[float]] | None = None,
    target: Target | None = None,
) -> dict[str, Any]:
    """Give one line of the table from samples by round; without a peer, only our own figure."""
    found: dict[str, Any] = {"figure": figure, "ours": _flat(ours), "peer": peer}
    if theirs is not None:
        found |= {"theirs": _flat(theirs), "ratio": ratio(ours, theirs)}
    if target is not None:
        value = found["ours"] if target.own else found["ratio"]
        found |= {"target": str(target), "reached": target.reached(value.median)}
    return found


def _flat(rounds: Sequence[Sequence[float]]) -> Spread:
    return spread([value for samples in rounds for value in samples])


def step_row(
    options: Options, work: Work, peers: Mapping[str, int], targets: Mapping[tuple[str, str], Target]
) -> dict[str, Any]:
    """Take steps on the same tokens; `peers` says how many runs each peer gets. The losses of all arms must agree."""
    runs = 1 if options.quick else max(peers.values())
    results = {"lorakit": [], **{peer: [] for peer in peers}}
    for turn in range(runs):  # a peer with fewer runs drops out of the later rounds
        now = ["lorakit", *(peer for peer, wanted in peers.items() if turn < wanted)]
        jobs = {arm: job(options, arm, work) for arm in now[:: 1 if turn % 2 == 0 else -1]}
        for arm, found in alternate(jobs, 1, say, WORKER).items():
            results[arm] += found
    lines = []
    for peer, wanted in peers.items():
        ours, theirs = results["lorakit"][:wanted], results[peer]
        for figure, samples in FIGURES.items():
            values = [[samples(work, run) for run in side] for side in (ours, theirs)]
            lines.append(line(figure, values[0], peer, values[1], targets.get((peer, figure))))
    losses = {arm: (found[0]["loss"], found[0]["grad_norm"]) for arm, found in results.items()}
    within = ROUNDING if work.dtype == "bfloat16" else EXACT
    off = {
        peer: abs(losses["lorakit"][0] / losses[peer][0] - 1) for peer in peers
    }  # gradients are compared by `lorakit bench`, which also knows the float32 ones
    agreement = {"loss_off": off, "within": within, "agrees": all(value <= within for value in off.values())}
    said = {**asdict(work), "model": Path(work.model).name}  # not where it lies on this machine
    return {"work": said, "lines": lines, "agreement": agreement, "losses": losses, "raw": results}


FIGURES: dict[str, Callable[[Work, dict[str, Any]], list[float]]] = {
    "tokens/s": lambda work, run: [work.tokens / seconds for seconds in run["wall"]],
    "CPU s/step": lambda _, run: run["cpu"],
    "peak MB": lambda _, run: [run["peak_memory"] / 1e6],
}


def data_row(
    options: Options,
    arms: Sequence[str],
    runs: int,
    targets: Mapping[tuple[str, str], Target],
    turns: Sequence[int] = (1,),
) -> Any:
    """Make one pass over the same chats with each arm."""
    import _peer_data
    import torch

    if options.data is None:
        return {"skipped": "needs --data, the E2E challenge's directory with devset.csv"}
    directory = options.scratch / f"chats-{'-'.join(map(str, turns))}"
    directory.mkdir(exist_ok=True)
    rows = 24 if options.quick else options.rows // (1 if len(turns) == 1 else 2)
    facts = _peer_data.prepare(options.data, rows, options.model, directory, turns)
    batch = 8 if not options.quick else 4
    budget = -(-batch * facts["tokens"] // rows // 64) * 64  # as many tokens as a batch of the others has on average
    extra = {"directory": str(directory), "batch": batch, "budget": budget, "cuda": torch.cuda.is_available()}
    work = replace(options.work(), batch=batch)
    jobs = {arm: job(options, arm, work, **extra, longest=facts["longest"]) for arm in ("data lorakit", *arms)}
    results = alternate(jobs, 1 if options.quick else runs, say, WORKER)
    lines = []
    for arm in arms:
        for figure, samples in DATA_FIGURES.items():
            ours, theirs = ([samples(run) for run in results[side]] for side in ("data lorakit", arm))
            lines.append(line(figure, ours, arm[5:], theirs, targets.get((arm[5:], figure))))
    first = {arm: found[0] for arm, found in results.items()}
    mean = first["data lorakit"]["loss"]
    off = {arm[5:]: abs(first[arm]["loss"] / mean - 1) for arm in arms}
    same = all(run["trained_tokens"] == facts["trained"] for run in first.values())
    agreement = {
        "loss_off": off,
        "within": TRL_LIMIT,
        "agrees": same and all(value <= TRL_LIMIT for value in off.values()),
        "trained_tokens": {arm: run["trained_tokens"] for arm, run in first.items()},
    }
    return {"data": {**facts, "batch": batch, "budget": budget}, "lines": lines, "agreement": agreement, "raw": results}


DATA_FIGURES: dict[str, Callable[[dict[str, Any]], list[float]]] = {
    "tokens/s": lambda run: [tokens / seconds for tokens, seconds in zip(run["tokens"], run["wall"], strict=True)],
    "CPU s/1000 tokens": lambda run: [
        1000 * seconds / tokens for tokens, seconds in zip(run["tokens"], run["cpu"], strict=True)
    ],
    "peak MB": lambda run: [run["peak_memory"] / 1e6],
}


def life_row(
    options: Options, what: str, figures: Mapping[str, str], targets: Mapping[str, Target], **extra: Any
) -> dict[str, Any]:
    """Run both arms of `what` once; `figures` names a sample list of theirs -> how the table calls it."""
    jobs = {side: job(options, f"{what} {side}", options.work(), **extra) for side in ("lorakit", "PEFT")}
    results = {side: run_arm(jobs[side], WORKER) for side in jobs}
    built = "not_built" not in results["lorakit"]
    lines = []
    for key, figure in figures.items():
        theirs = [results["PEFT"][key]]
        ours = [results["lorakit"][key]] if built and key in results["lorakit"] else None
        if ours is None:
            lines.append({"figure": figure, "ours": None, "peer": "PEFT", "theirs": _flat(theirs)})
        else:
            lines.append(line(figure, ours, "PEFT", theirs, targets.get(key)))
    missing = {} if built else {"not_built": results["lorakit"]["not_built"]}
    return {"lines": lines, **missing, "raw": results}


def command_row(options: Options, target: Target) -> dict[str, Any]:
    """Time `lorakit --help`, whole processes: by the wall, since that is what a person waits for, and by the processor."""
    wall, cpu = [], []
    for _ in range(3 if options.quick else 9):
        began = time.perf_counter(), _children()
        subprocess.run([sys.executable, "-m", "lorakit", "--help"], check=True, capture_output=True)
        wall.append(time.perf_counter() - began[0])
        cpu.append(_children() - began[1])
    return {"lines": [line("s", [wall], target=target), line("CPU s", [cpu])], "raw": {"wall": wall, "cpu": cpu}}


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


IMPORT = """
import time, torch
began = time.process_time()
import {0}
{1}
print(time.process_time() - began)
"""


def import_row(options: Options, target: Target) -> dict[str, Any]:
    """Time what an import costs on top of torch, until adapters can be attached, saved and loaded."""
    uses = {"lorakit": "lorakit.attach, lorakit.LoRA, lorakit.save, lorakit.load", "peft": "peft.get_peft_model"}
    samples: dict[str, list[float]] = {name: [] for name in uses}
    for _ in range(1 if options.quick else 3):
        for name, use in uses.items():
            code = IMPORT.format(name, use)
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            samples[name].append(float(done.stdout.split()[-1]))
    lines = [line("CPU s", [samples["lorakit"]], "PEFT", [samples["peft"]], target)]
    return {"lines": lines, "raw": samples}


def saved_row(options: Options, target: Target) -> dict[str, Any]:
    """Count what the forward pass of a Llama-8B-shaped block keeps, above the frozen base."""
    import _peer_saved

    directory = options.scratch / "block"
    for layers in (1, 2):
        _peer_saved.make_model(directory / str(layers), layers)
    length = 96 if options.quick else 544  # beyond the length up to which lorakit keeps attention's probabilities
    work = replace(options.work(model=str(directory)), batch=1, length=length)
    raw = {arm: run_arm(job(options, f"saved {arm}", work), WORKER) for arm in ("base", "lorakit", "PEFT")}
    units = {arm: found["units"][0] for arm, found in raw.items()}
    above = {arm: [[units[arm] - units["base"]]] for arm in ("lorakit", "PEFT")}
    whole = line("units, all", [[units["lorakit"]]], "PEFT", [[units["PEFT"]]])
    lines = [line("units above the base", above["lorakit"], target=target)]
    lines += [line("PEFT's units above the base", above["PEFT"]), whole]
    off = abs(raw["lorakit"]["loss"] / raw["PEFT"]["loss"] - 1)
    agreement = {"loss_off": {"PEFT": off}, "within": ROUNDING, "agrees": off <= ROUNDING}
    return {"tokens": length, "lines": lines, "agreement": agreement, "raw": raw}


def job(options: Options, arm: str, work: Work, **extra: Any) -> dict[str, Any]:
    """Give what a worker reads."""
    where = {"peers": [str(options.peers)]} if options.peers else {}
    return {"arm": arm, "work": asdict(work), **where, **extra}


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"  {text}", file=sys.stderr, flush=True)
