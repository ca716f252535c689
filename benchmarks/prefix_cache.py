"""What keeping the frozen prefix saves: seconds of an epoch with `train.cache_prefix` and without, on SmolLM2-135M.

    python benchmarks/prefix_cache.py [--rows 64] [--epochs 3] [--layers 12 6] [--dtype bfloat16] [--output DIRECTORY]

Rows are orders of the quickstart's task. Each arm is a process of its own; of each pair the one that goes first alternates. An
epoch lasts from the end of the last one's last step to the end of its own, the first one from the end of its first step, which
loads what is loaded lazily. The losses of both are compared: those of the first epoch must be the same to the last bit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from _common import (
    RESULTS,
    StepClock,
    agreement,
    environment,
    measured_with,
    megabytes,
    peak_memory,
    table,
    write_json,
    write_results,
)

NAME = "prefix_cache"
ARMS = ("without", "with")


def train(job: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """Run one arm in this process."""
    import torch

    from lorakit.core.adapter import Method
    from lorakit.core.registry import METHODS
    from lorakit.core.target import Target
    from lorakit.train import config as c
    from lorakit.train.run import run

    torch.set_num_threads(job["threads"])
    method: Method = METHODS["lora"](r=8)
    clock = StepClock()
    result = run(
        c.RunConfig(
            model=c.ModelConfig(name=job["model"], dtype=job["dtype"]),
            data=c.DataConfig(path=job["data"]),
            method=c.MethodConfig.of(method, Target(last_n_layers=job["layers"])),
            optim=c.OptimConfig(lr=1e-3),
            train=c.TrainOptions(
                batch_size=job["batch_size"],
                epochs=job["epochs"],
                save_steps=0,
                cache_prefix=job["arm"] == "with",
            ),
            output=str(work / "run"),
        )
    )
    clock.seconds()
    records = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    ends = [i for i, record in enumerate(records) if record["epoch"] == int(record["epoch"])]
    said = [line for line in (result.directory / "log.txt").read_text().splitlines() if "frozen prefix" in line]
    return {
        "losses": [record["loss"] for record in records],
        "steps_of_an_epoch": ends[0] + 1,
        "cpu": [clock.cpu[end] - clock.cpu[begin] for begin, end in zip([0, *ends], ends, strict=False)],
        "wall": [clock.wall[end] - clock.wall[begin] for begin, end in zip([0, *ends], ends, strict=False)],
        "peak_memory": peak_memory(),
        "said": said[0].partition("frozen prefix: ")[2] if said else None,
    }


def pair(common: Mapping[str, Any], layers: int, turn: int) -> dict[str, Any]:
    """Run both arms, each in a fresh process, and compare them."""
    found: dict[str, Any] = {"layers": layers}
    for arm in ARMS if turn % 2 == 0 else ARMS[::-1]:
        print(f"last {layers} blocks, {arm} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as directory:
            job = Path(directory) / "job.json"
            write_json(job, {**common, "layers": layers, "arm": arm})
            command = [sys.executable, __file__, "--job", str(job)]
            quiet = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quiet)
            if done.returncode:
                raise SystemExit(f"{arm} failed with exit code {done.returncode}:\n{done.stdout[-4000:]}")
            found[arm] = json.loads((Path(directory) / "result.json").read_text())
    return {**found, **compared(found["with"], found["without"])}


def compared(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the arm that keeps the prefix with the other one."""
    first = other["steps_of_an_epoch"]
    return {
        "first_epoch_is_the_same": own["losses"][:first] == other["losses"][:first],
        "agreement": agreement(own["losses"], other["losses"]),
        "times_faster": {
            clock: [b / a for a, b in zip(own[clock], other[clock], strict=True)] for clock in ("cpu", "wall")
        },
    }


def report(content: Mapping[str, Any]) -> str:
    """Write the figures as Markdown."""
    rows = []
    for found in content["runs"]:
        for arm in ARMS:
            own = found[arm]
            later = [median(own[clock][1:]) for clock in ("cpu", "wall")]
            cells = [f"{own['cpu'][0]:.1f}", f"{later[0]:.1f}", f"{later[1]:.1f}"]
            rows.append([f"last {found['layers']}", arm, *cells, megabytes(own["peak_memory"])])
        faster = found["times_faster"]
        ratios = [f"{median(faster[clock][1:]):.2f} x" for clock in ("cpu", "wall")]
        rows.append(["", "ratio", f"{faster['cpu'][0]:.2f} x", *ratios, ""])
    header = ["adapted blocks", "prefix kept", "epoch 1, CPU s", "later, CPU s", "later, wall s", "peak"]
    said = [
        f"- last {found['layers']} blocks: {found['with']['said']}; losses of the first epoch "
        f"{'are the same bits' if found['first_epoch_is_the_same'] else 'DIFFER'}, largest relative difference of any "
        f"step {found['agreement']['largest_relative']:.1e}"
        for found in content["runs"]
    ]
    job = content["job"]
    about = (
        f"{job['rows']} orders, {job['epochs']} epochs, batches of {job['batch_size']} rows, {job['dtype']}, LoRA r 8."
    )
    return "\n".join(
        ["# The frozen prefix", "", about, "", table(header, rows), *said, "", measured_with(content["environment"])]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[12, 6], help="how many of the last blocks are adapted"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        write_json(given.job.parent / "result.json", train(json.loads(given.job.read_text()), given.job.parent))
        return
    if given.epochs < 2:
        raise SystemExit("the second epoch is the first that can be faster")
    from lorakit.data import orders_task

    around = environment()
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "orders.jsonl"
        rows = orders_task.rows(0, given.rows, 1)[0]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = ("epochs", "batch_size", "dtype", "model", "threads")
        common = {**{key: vars(given)[key] for key in keys}, "rows": len(rows), "data": str(data)}
        runs = [pair(common, layers, turn) for turn, layers in enumerate(given.layers)]
    job = {key: value for key, value in common.items() if key != "data"}
    content = {"environment": {**around, "threads": given.threads}, "job": job, "runs": runs}
    print(write_results(NAME, given.output, content, report(content)).read_text())


if __name__ == "__main__":
    main()
