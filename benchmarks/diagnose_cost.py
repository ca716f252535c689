"""What `train.diagnose` costs: its share of the processor time of a run on SmolLM2-135M, by what it does.

    python benchmarks/diagnose_cost.py [--steps 400] [--batch-size 4] [--dtype bfloat16] [--output DIRECTORY]

Rows are orders of the quickstart's task, looks at step 1 and every 60th as by default, one evaluation in the middle and one at the
end. The clock runs around each call of the run's `Watching`; two runs, with and without, differ by less than they vary.
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _common import RESULTS, environment, measured_with, table, write_results

NAME = "diagnose_cost"
WHAT = {
    "gradient": "copies of the gradient at a look",
    "update": "weights before and after, the loss once more",
    "stepped": "sums of every step",
    "evaluated": "slope on validation rows",
}


def clocked(into: Counter[str]) -> None:
    """Let every `Watching` add its processor seconds to `into`."""
    from lorakit.train.diagnostics import Watching

    def around(name: str) -> Callable[..., Any]:
        plain = getattr(Watching, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return plain(*args, **kwargs)
            finally:
                into[name] += time.process_time() - began

        return measured

    plain = Watching.update

    @contextmanager
    def update(*args: Any) -> Generator[None]:
        """Leave out the optimizer's own step, which stands in the middle."""
        began, block = time.process_time(), plain(*args)
        block.__enter__()
        into["update"] += time.process_time() - began
        yield
        began = time.process_time()
        block.__exit__(None, None, None)
        into["update"] += time.process_time() - began

    for name in ("gradient", "stepped", "evaluated"):
        setattr(Watching, name, around(name))
    Watching.update = update  # type: ignore[invalid-assignment]


def train(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run it; give the seconds of the whole training and of the parts that watched."""
    import torch

    from lorakit.core.registry import METHODS
    from lorakit.data import orders_task
    from lorakit.train import config as c
    from lorakit.train.run import run

    torch.set_num_threads(given.threads)
    rows, valid = orders_task.rows(0, given.steps * given.batch_size // 2, 64)
    for name, content in (("train", rows), ("valid", valid)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    spent: Counter[str] = Counter()
    clocked(spent)
    began = time.process_time()
    result = run(
        c.RunConfig(
            model=c.ModelConfig(name=given.model, dtype=given.dtype),
            data=c.DataConfig(path=str(work / "train.jsonl"), valid=str(work / "valid.jsonl")),
            method=c.MethodConfig.of(METHODS["lora"](r=16)),
            train=c.TrainOptions(
                batch_size=given.batch_size,
                max_steps=given.steps,
                eval_steps=given.steps // 2,
                save_steps=0,
                diagnose=True,
            ),
            output=str(work / "run"),
        )
    )
    whole = time.process_time() - began
    records = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    looks = sum("gain_ratio" in record for record in records)
    return {"seconds": whole, "watching": dict(spent), "looks": looks, "share": sum(spent.values()) / whole}


def report(content: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    found, job = content["found"], content["job"]
    rows = [[WHAT[k], f"{s:.2f}", f"{100 * s / found['seconds']:.2f} %"] for k, s in found["watching"].items()]
    rows.append(["together", f"{sum(found['watching'].values()):.2f}", f"{100 * found['share']:.2f} %"])
    about = (
        f"{job['steps']} steps of {job['batch_size']} orders, {job['dtype']}, LoRA r 16, {found['looks']} looks, 2 evaluations of 64 "
        f"rows; {found['seconds']:.1f} s of processor time in all, with loading."
    )
    header = ["what", "CPU s", "of the run"]
    return "\n".join(
        ["# What train.diagnose costs", "", about, "", table(header, rows), measured_with(content["environment"])]
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    where = {**environment(), "threads": given.threads}
    with tempfile.TemporaryDirectory() as directory:
        found = train(given, Path(directory))
    job = {key: vars(given)[key] for key in ("steps", "batch_size", "dtype", "model", "threads")}
    content = {"environment": where, "job": job, "found": found}
    print(write_results(NAME, given.output, content, report(content)).read_text())


if __name__ == "__main__":
    main()
