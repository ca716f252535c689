"""Every method, start, optimizer and controller on a real model: the quickstart's task on SmolLM2-135M, from training to file.

    python benchmarks/methods_smollm2.py                            # all arms that are not in the results yet
    python benchmarks/methods_smollm2.py --arms method/dora init/eva
    python benchmarks/methods_smollm2.py --kind method --again      # measure these anew

An arm is trained in a process of its own, with the smallest budget that tells what learns from what does not (16 steps of 8
orders on the last 12 blocks) and a rate of its own, and says at the end what it learned: the loss and the exact answers on 16
orders that were not trained. A fresh process opens the file, must write the same answers, merges or says why it cannot, and
takes the run up again from the checkpoint before its end, which must come to the same bytes. An arm that is in the results is
not run again unless it failed, so the sweep can be stopped at any time. It does not rank methods: the budget is small, and
the rates are sensible, not searched for.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _common import RESULTS, environment, measured_with, megabytes, table, write_json

NAME, MODEL, QUESTIONS = "methods_smollm2", "smollm2", 16
SETTINGS: Mapping[str, Any] = {
    "steps": 16,
    "batch_size": 8,
    "last_n_layers": 12,
    "rows": 128,
    "written": 4,  # answers really written, in both processes
    "max_tokens": 40,
    "again": 4,  # steps that the resumed run takes
}
LOSS, RIGHT = 0.35, 4  # above, an arm has not learned; fewer, hardly
DOCS = Path(__file__).parents[1] / "docs" / "methods"
KINDS = ("method", "init", "optimizer", "controller")
PARTS = ("train", "check")

RATE = (1e-3, "the quickstart's")
RATES: Mapping[str, tuple[float, str]] = {
    "method/adalora": (3e-2, "E starts at zero and A and B are small; at 5e-3 the loss falls to 0.59 only"),
    "method/bitfit": (1e-2, "the upper end of what its file says"),
    "method/boft": (3e-3, "few numbers, each turns many inputs"),
    "method/fourierft": (5e-2, "of its paper's order: the coefficients are scaled down"),
    "method/full": (1e-4, "a tenth of LoRA's"),
    "method/hira": (2e-2, "B A is multiplied by W, whose entries are small"),
    "method/ia3": (2e-2, "few numbers near 1; ten times its paper's for a run a hundredth as long"),
    "method/loha": (1.5e-2, "a product of products starts slower than one product"),
    "method/lokr": (1.5e-2, "as for LoHa"),
    "method/lora_fa": (4e-3, "only B moves"),
    "method/lora_xs": (1e-2, "few numbers between frozen factors"),
    "method/oft": (3e-3, "few numbers, each turns many inputs"),
    "method/randlora": (2e-3, "only scales of random matrices move, of many at once; 1e-2 diverges"),
    "method/vera": (5e-2, "only scales of random matrices move; at 1e-2 the loss falls to 1.81 in 14 steps"),
    "method/xlora": (1e-2, "a router's scalings go from 0 towards 1"),
    "controller/adalora": (3e-2, "as for the method"),
    "optimizer/flora": (
        1e-1,
        "relative to the size of the weights, which for a change that starts at zero counts as 1e-3",
    ),
    "optimizer/galore": (
        2e-3,
        "above that of full fine-tuning over its own scale of 0.25; at 4e-4 the loss falls to 0.74 only",
    ),
    "optimizer/lora_pro": (1e-4, "that of full fine-tuning, as its file says"),
    "optimizer/lora_fa": (4e-3, "only B moves; at 1e-3 the loss falls to 0.35"),
    "optimizer/muon": (
        1e-2,
        "its updates have a fifth of the size of AdamW's first ones; at 1e-3 the loss falls to 1.40 only",
    ),
    "optimizer/sgd": (3e-1, "steps as long as the gradient, which is small"),
}
TARGETS: Mapping[str, Sequence[str]] = {  # where the files say that the papers put them
    "houlsby": ["o_proj", "down_proj"],
    "ia3": ["k_proj", "v_proj", "down_proj"],
    "parallel": ["down_proj"],
    "pfeiffer": ["down_proj"],
}
CONTROLLED: Mapping[str, Mapping[str, Any]] = {"molora": {"top_k": 2}}  # it balances only routers that choose


@dataclass(frozen=True)
class Arm:
    """What is trained. `name` is kind/file."""

    name: str
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    controller: str | None = None
    quantize: str | None = None

    def job(self, lr: float | None) -> dict[str, Any]:
        """Give it as JSON, with its rate and where its adapters go."""
        rate, reason = RATES.get(self.name, RATE)
        chosen = (rate, reason) if lr is None else (lr, "given")
        return {**asdict(self), "lr": chosen[0], "why_lr": chosen[1], "target": TARGETS.get(self.method)}


def arms() -> Iterator[Arm]:
    """Give an arm for each file, those of other kinds than methods on LoRA, or on what they need."""
    import lorakit as lk
    from lorakit.optim import OPTIMIZERS
    from lorakit.train.controllers import CONTROLLERS

    for name in sorted(lk.METHODS):
        yield Arm(f"method/{name}", method=name)
    for name in sorted(lk.INITS):
        wanted = vars(lk.INITS.module(name)).get("NEEDS", ())
        yield Arm(f"init/{name}", options={"init": name}, quantize="nf4" if "residual" in wanted else None)
    for name in sorted(OPTIMIZERS):
        yield Arm(f"optimizer/{name}", method="full" if wants_weights(name) else "lora", optim={"name": name})
    for name in sorted(CONTROLLERS):
        method = vars(CONTROLLERS.module(name)).get("METHOD_NAME", "lora")
        yield Arm(f"controller/{name}", method=method, options=CONTROLLED.get(name, {}), controller=name)


def wants_weights(optimizer: str) -> bool:
    """Whether an optimizer refuses LoRA's factors and takes weights trained in full."""
    import torch

    import lorakit as lk
    from lorakit.core.errors import UsageError
    from lorakit.optim import OPTIMIZERS, parameter_groups
    from lorakit.train.config import OptimConfig

    def takes(method: lk.Method) -> bool:
        model, config = lk.attach(torch.nn.Sequential(torch.nn.Linear(160, 192)), method), OptimConfig(name=optimizer)
        try:
            OPTIMIZERS[optimizer](parameter_groups(model, "default", config), config)
        except UsageError:
            return False
        return True

    return not takes(lk.LoRA()) and takes(lk.METHODS["full"]())


def measure(arm: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Train and check one arm, each in a fresh process. What they leave on disk is gone afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        work, result = Path(directory), dict[str, Any](arm=arm)
        write_json(work / "job.json", {**common, "arm": arm})
        for part in PARTS:
            result[part] = run_part(part, work, common["threads"])
            if "refused" in result[part] or "failed" in result[part]:
                break
    return result


def run_part(part: str, work: Path, threads: int) -> dict[str, Any]:
    """Run `train` or `check` in a process of its own; the end of its output if it fails."""
    command = [sys.executable, sys.argv[0], "--part", part, "--job", str(work / "job.json")]
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings)
    if done.returncode:
        return {"failed": done.stdout[-3000:]}
    return json.loads((work / f"{part}.json").read_text())


def serve(part: str, job: Path) -> None:
    """Do the work of the process that `run_part` started."""
    import _smollm2

    work = {"train": _smollm2.train, "check": _smollm2.check}[part]
    write_json(job.parent / f"{part}.json", work(json.loads(job.read_text()), job.parent))


def row(name: str, result: Mapping[str, Any]) -> list[str]:
    """Give an arm's line of the table."""
    from _smollm2 import verdict

    arm, trained, checked = result["arm"], result["train"], result.get("check", {})
    rate = f"{arm['lr']:g}"
    for part in (trained, checked):
        if "refused" in part or "failed" in part:
            return [name, rate, *["-"] * 8, "refused" if "refused" in part else "failed"]
    before, after, merged = checked["before"], checked["after"], checked["merged"]
    wrong = verdict(result, LOSS, RIGHT)
    return [
        name,
        rate,
        f"{trained['trainable']:,}",
        f"{before['loss']:.2f} → {after['loss']:.3f}",
        f"{before['right']} → {after['right']}",
        "yes" if checked["answers"] == trained["answers"] else "no",
        "yes" if checked["resumed_is_the_same"] else "no",
        f"{merged['right']}" if "right" in merged else "cannot",
        f"{trained['steps_seconds']:.0f}",
        megabytes(trained["peak_memory"]),
        "; ".join(wrong) or "learned",
    ]


def report(content: Mapping[str, Any]) -> str:
    """Give the results in words and tables."""
    s = content["settings"]
    header = ["arm", "rate", "trained", "loss", "right", "reopened", "resumed", "merged", "s", "memory", ""]
    lines = [
        "# The quickstart's task with every method\n",
        f"Made by `benchmarks/{NAME}.py`: {content['model']} in {content['dtype']}, {s['steps']} steps of {s['batch_size']} orders, "
        f"adapters on the last {s['last_n_layers']} blocks, seed {content['seed']}, linear schedule, default settings of each file.\n",
        "Loss: nats a token of the answers of 16 orders that were not trained, before and after; right: how many of the 16 a "
        "greedy answer gets exactly. Reopened: a fresh process writes the same answers from the file. Resumed: a run that "
        f"goes on from the checkpoint {s['again']} steps before the end comes to the same bytes. Merged: right answers of the merged "
        "model. s: seconds of all steps with the evaluation, beside other work; memory: the peak of the process. Learned: a loss of "
        f"at most {LOSS} and at least {RIGHT} right.\n",
        "It says that each of them works from training to file, and not which is best: the budget is the smallest that tells "
        "what learns from what does not, and the rates were chosen, not searched for.\n",
    ]
    for kind in KINDS:
        own = {name: result for name, result in content["arms"].items() if name.startswith(f"{kind}/")}
        if own:
            lines += [f"## {kind}\n", table(header, [row(name.partition("/")[2], own[name]) for name in sorted(own)])]
            lines += list(remarks(own))
    return "\n".join([*lines, measured_with(content["environment"])])


def remarks(arms: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Give the reasons: of rates, of refusals, of what cannot be merged."""
    for name, result in sorted(arms.items()):
        said = []
        if result["arm"]["why_lr"] != RATE[1]:
            said.append(f"rate: {result['arm']['why_lr']}")
        for part in PARTS:
            said += [
                f"{key}: {result[part][key].strip().splitlines()[-1]}"
                for key in ("refused", "failed")
                if key in result.get(part, {})
            ]
        merged, after = result.get("check", {}).get("merged", {}), result.get("check", {}).get("after", {})
        if "refused" in merged:
            said.append(f"not merged: {merged['refused']}")
        elif merged and abs(merged["loss"] - after["loss"]) > 0.05 * max(after["loss"], 0.1):
            said.append(f"rounded to the base's dtype by merging, the loss is {merged['loss']:.3f}")
        if said:
            yield f"- `{name.partition('/')[2]}`: {'; '.join(said)}."
    yield ""


def parse() -> argparse.Namespace:
    """Read the command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--arms", nargs="+", help="only these, as kind/file, such as method/dora")
    options.add_argument("--kind", choices=KINDS, help="only the arms of one kind")
    options.add_argument("--again", action="store_true", help="run arms that are in the results already")
    options.add_argument("--steps", type=int, default=SETTINGS["steps"])
    options.add_argument("--lr", type=float, help="in place of the arms' own rates")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base")
    options.add_argument("--model", default=MODEL)
    options.add_argument("--output", type=Path, default=RESULTS)
    options.add_argument("--docs", type=Path, default=DOCS)
    options.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return options.parse_args()


def main() -> None:
    """Run what is missing."""
    options = parse()
    if options.part:
        serve(options.part, options.job)
        return
    from lorakit.data import orders_task

    settings = {**SETTINGS, "steps": options.steps}
    common = {"model": options.model, "dtype": options.dtype, "seed": options.seed, "settings": settings}
    file = options.output / f"{NAME}.json"
    content = begun(file, common) if file.exists() else {"benchmark": NAME, **common, "arms": {}}
    content["environment"] = environment() | {"threads": options.threads}
    chosen = {arm.name: arm for arm in arms() if options.kind in (None, arm.name.partition("/")[0])}
    unknown = set(options.arms or ()) - chosen.keys()
    if unknown:
        raise SystemExit(f"no such arm: {', '.join(sorted(unknown))}; there are: {', '.join(chosen)}")
    for directory in (options.output, options.docs):
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data:
        orders_task.write(data, options.seed, settings["rows"], QUESTIONS)
        for name in options.arms or chosen:
            if done(content["arms"].get(name)) and not options.again:
                continue
            job = {**common, "threads": options.threads, "data": data, "rate": RATE[0]}
            content["arms"][name] = measure(chosen[name].job(options.lr), job)
            print(" | ".join(row(name, content["arms"][name])), file=sys.stderr, flush=True)
            write_json(file.with_suffix(".part"), content)
            file.with_suffix(".part").replace(file)
            (options.docs / "smollm2.md").write_text(report(content))
    if not all(map(done, content["arms"].values())):
        raise SystemExit(1)


def done(result: Mapping[str, Any] | None) -> bool:
    """Whether an arm has a result: what failed is run again."""
    return result is not None and not any("failed" in part for part in result.values())


def begun(file: Path, common: Mapping[str, Any]) -> dict[str, Any]:
    """Read the results so far. Raises SystemExit if they were measured with other settings, which are not to be mixed."""
    content = json.loads(file.read_text())
    other = [key for key, value in common.items() if content[key] != value]
    if other:
        raise SystemExit(f"{file} was measured with another {', '.join(other)}: give another --output, or remove it")
    return content


if __name__ == "__main__":
    main()
