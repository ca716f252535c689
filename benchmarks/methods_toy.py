"""Every method, start, optimizer and controller on a problem whose best answer is known: a linear teacher of 32 inputs.

    python benchmarks/methods_toy.py                 # all, under three minutes on one core
    python benchmarks/methods_toy.py --arms lora dora

y = (W + D) x, D with the singular values 1, .8, .6, .5, .4, .3, .2, .1; each arm trains a change of W for the same number of
steps (cosine, 3 % warm-up, no clipping) with a rate of its own: the best of a grid (5 rates, and on while the best one is at
an end; of equally good ones the smallest), chosen on seed 0. The error is that of three other seeds, which draw W, D, the
inputs and the start anew; the optimum is what linear algebra says the best values of the trained parameters give (`_toy.py`),
"-" where nothing is known. A file that is added to lorakit is an arm by itself, of rank 4 if it has a rank; what refuses to
run here is listed with its reason.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from _common import RESULTS, environment, measured_with, table, write_json
from _toy import PLANTED, SPECTRUM, Arm, Outcome, sized, train
from _toy_plot import plot

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.optim import OPTIMIZERS
from lorakit.train.controllers import CONTROLLERS

RANK, STEPS, SEEDS, VALIDATION = 4, 250, (1, 2, 3), 0
GRID = tuple(10 ** (-3 + i / 2) for i in range(5))
MOST = 10  # rates tried per arm
SIZES: Mapping[str, Any] = {
    "r": RANK,
    "bottleneck": RANK,
    "reduction_factor": 8.0,
    "n_frequency": 256,
    "oft_block_size": 16,
}
# Where the rank means another thing: what trains about as many numbers as LoRA's 256.
OWN: Mapping[str, Mapping[str, Any]] = {
    "vera": {"r": 224},
    "lora_xs": {"r": 16},
    "loha": {"r": 2},
    "miss": {"r": 8},
    "molora": {"r": 1},
    "stack": {"parts": ({"name": "lora", "r": 2}, {"name": "houlsby", "bottleneck": 2})},
    "adalora": {"init_r": 2 * RANK, "target_r": RANK},
}
CONTROLLED: Mapping[str, Mapping[str, Any]] = {"molora": {"top_k": 2}}  # it balances only routers that choose
DOCS = Path(__file__).parents[1] / "docs" / "methods"
NAME = "methods_toy"
KINDS = {
    "baseline": "Baselines",
    "method": "Methods, trained by AdamW",
    "init": "Starts of LoRA (`method.init`)",
    "optimizer": "Optimizers (`optim.name`)",
    "controller": "Controllers (`train.controller`)",
    "anisotropic": "Inputs of ten times the spread in one direction than in another",
}


def arms() -> Iterator[Arm]:
    """Give every arm: the baselines, then whatever files there are."""
    for r in (1, 2, 4, 8, 16):
        yield Arm("baseline", f"LoRA of rank {r}", options={"r": r})
    yield Arm("baseline", "rsLoRA", options={"rank_stabilized": True})
    yield Arm("baseline", "LoRA+ (`b_ratio: 16`)", optim={"b_ratio": 16.0})
    yield Arm("baseline", "LoRA of rank 4, two layers of ranks 1 and 7", spectra=PLANTED)
    for name in sorted(lk.METHODS):
        yield Arm("method", name, method=name)
    for name in sorted(lk.INITS):
        yield Arm("init", name, options={"init": name})
    for name in sorted(OPTIMIZERS):
        yield optimizer_arm(name)
    for name in sorted(CONTROLLERS):
        yield controller_arm(name)
    for prune in ("forget", "magnitude"):
        yield Arm("controller", f"relora, `prune: {prune}`", controller="relora", settings={"prune": prune})
    for name in ("kaiming", "eva", "corda"):
        yield Arm("anisotropic", f"LoRA, {name}", options={"init": name}, isotropic=False)


def controller_arm(name: str) -> Arm:
    """Give a controller with the method that brings it along, or LoRA; with two layers if it has a budget to share out."""
    method = vars(CONTROLLERS.module(name)).get("METHOD_NAME", "lora")
    if "target_r" in vars(lk.METHODS[method]()):
        return Arm(
            "controller", f"{name}, two layers of ranks 1 and 7", method=method, controller=name, spectra=PLANTED
        )
    return Arm("controller", name, method=method, controller=name, options=CONTROLLED.get(name, {}))


def optimizer_arm(name: str) -> Arm:
    """Give the first of these that the optimizer takes: LoRA; weights trained in full; these with its own rank at 4."""
    tried = [
        Arm("optimizer", name, optim={"name": name}),
        Arm("optimizer", f"{name}, all weights", method="full", optim={"name": name}),
        Arm("optimizer", f"{name}, all weights", method="full", optim={"name": name, "options": {"rank": RANK}}),
    ]
    for arm in tried:
        try:
            train(sized(arm, SIZES, OWN), 1e-3, VALIDATION, 1)
        except UsageError:
            continue
        return arm
    return tried[0]


def file_of(name: str) -> str:
    """Give the file that an arm of this name is about."""
    return name.partition(",")[0]


def measure(arm: Arm, steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Find the arm's rate and give what it comes to; or why it cannot run here."""
    named = {"kind": arm.kind, "name": arm.name, "method": arm.method}
    began = time.process_time()
    try:
        made = sized(arm, SIZES, OWN)
        curve = sweep(made, steps)
        best = best_rate(curve)
        runs = [train(made, best, seed, steps) for seed in seeds]
    except UsageError as error:
        return {**named, "refused": ": ".join(filter(None, (error.what, error.why)))}
    return {
        **named,
        "options": dict(made.options),
        "curve": {f"{rate:.3g}": value for rate, value in sorted(curve.items())},
        "best_lr": best,
        **over_seeds(runs),
        "cpu_seconds": round(time.process_time() - began, 2),
    }


def sweep(arm: Arm, steps: int) -> dict[float, float]:
    """Give rate -> error on the validation seed: the grid, and further while the best rate is at an end."""
    curve = {rate: train(arm, rate, VALIDATION, steps).error for rate in GRID}
    while len(curve) < MOST and best_rate(curve) in (min(curve), max(curve)):
        following = min(curve) / 10**0.5 if best_rate(curve) == min(curve) else max(curve) * 10**0.5
        if max(curve.values()) < 1.001 * min(curve.values()):  # no rate changes anything
            break
        curve[following] = train(arm, following, VALIDATION, steps).error
    return {rate: error if math.isfinite(error) else 1e9 for rate, error in curve.items()}


def best_rate(curve: Mapping[float, float]) -> float:
    """Give the smallest rate whose error is the least, give or take a thousandth (or 1e-6): beyond it is noise."""
    least = min(curve.values())
    return min(rate for rate, error in curve.items() if error <= 1.001 * least + 1e-6)


def over_seeds(runs: Sequence[Outcome]) -> dict[str, Any]:
    """Give means over the seeds; the ranks are those of the first."""
    errors = [min(run.error, 1e9) for run in runs]  # JSON knows no infinity
    optima = [run.optimum for run in runs if run.optimum is not None]
    ranks, merged = [r.ranks for r in runs if r.ranks is not None], [r.merged_error for r in runs]
    return {
        "errors": errors,
        "error": fmean(errors),
        "sd": stdev(errors) if len(errors) > 1 else 0.0,
        "optimum": fmean(optima) if len(optima) == len(runs) else None,
        "trainable": runs[0].trainable,
        "state_bytes": runs[0].state_bytes,
        "ranks": ranks[0] if ranks else None,
        "merged_error": None if None in merged else max(m for m in merged if m is not None),
    }


def number(value: float | None) -> str:
    """Write an error: four places, or a power of ten where they would say nothing."""
    if value is None:
        return "-"
    return f"{value:.4f}" if 5e-4 <= value < 1e3 else "0" if value < 1e-20 else f"{value:.0e}"


def row(arm: Mapping[str, Any]) -> list[str]:
    """Give an arm's line of the table."""
    if "refused" in arm:
        return [arm["name"], "refused", *["-"] * 7]
    return [
        arm["name"],
        f"{number(arm['error'])} ± {number(arm['sd'])}",
        number(arm["optimum"]),
        f"{arm['best_lr']:.2g}",
        f"{arm['trainable']:,}",
        f"{arm['state_bytes']:,}",
        "-" if arm["ranks"] is None else " + ".join(map(str, arm["ranks"])),
        "-" if arm["merged_error"] is None else f"{arm['merged_error']:.0e}",
        f"{arm['cpu_seconds']:.1f}",
    ]


def report(content: Mapping[str, Any]) -> str:
    """Give the results in words and tables."""
    header = ["arm", "error", "optimum", "rate", "trained", "state bytes", "rank", "merged", "CPU s"]
    lines = [
        "# A problem whose best answer is known\n",
        f"Made by `benchmarks/{NAME}.py`; {content['steps']} steps, seeds {', '.join(map(str, content['seeds']))}.\n",
        "A layer of 32 inputs and 32 outputs is to become W + D, D with the singular values "
        f"{', '.join(map(str, SPECTRUM))}. Error: mean squared distance from the teacher's outputs at the end, on inputs that were "
        "not trained on; doing nothing is 2.55. It is the mean of three seeds ± their standard deviation, at each arm's own rate, "
        "chosen on another seed. Optimum: the least error that any values of what was trained can have, - where no closed "
        "form is known. Rank: singular values of the change above 1 % of the largest, first seed. Merged: largest difference of the "
        "merged model's outputs and the adapted one's, relative to the largest output; - where it cannot be merged. Rank and "
        "width are 4; where a method's rank means another thing, it is the one that trains about as many numbers as LoRA does.\n",
        "It shows what a method can represent and whether its optimizer finds it. It does not show how well it adapts a "
        "language model: a teacher that is W plus a change of low rank is what LoRA is made for.\n",
        "![errors](toy.svg)\n",
    ]
    for kind, title in KINDS.items():
        own = [arm for arm in content["arms"] if arm["kind"] == kind]
        if own:
            lines += [f"## {title}\n", table(header, [row(arm) for arm in own])]
            lines += [f"`{arm['name']}` is refused: {arm['refused']}.\n" for arm in own if "refused" in arm]
    lines += [
        "## Errors by rate\n",
        "On the validation seed; the best rate is the one taken.\n",
        curves(content["arms"]),
    ]
    return "\n".join([*lines, measured_with(content["environment"])])


def curves(arms: Sequence[Mapping[str, Any]]) -> str:
    """Give the whole sweep: one line an arm, one column a rate that most arms were tried with."""
    ran = [arm for arm in arms if "curve" in arm]
    rates = sorted({rate for arm in ran for rate in arm["curve"]}, key=float)

    def cell(arm: Mapping[str, Any], rate: str) -> str:
        value = arm["curve"].get(rate)
        return "" if value is None else "diverged" if value >= 1e9 else number(value)

    return table(
        ["arm", *rates], [[f"{arm['kind']}: {arm['name']}", *(cell(arm, rate) for rate in rates)] for arm in ran]
    )


def write(content: Mapping[str, Any], output: Path, docs: Path) -> None:
    """Write the figures as JSON, and the page with its picture."""
    for directory in (output, docs):
        directory.mkdir(parents=True, exist_ok=True)
    write_json(output / f"{NAME}.json", content)
    (docs / "toy.md").write_text(report(content))
    (docs / "toy.svg").write_text(plot(content["arms"]))


def main() -> None:
    """Run the arms."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--arms", nargs="+", help="only arms of these names; nothing but the table is written")
    options.add_argument("--steps", type=int, default=STEPS)
    options.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options.add_argument("--output", type=Path, default=RESULTS)
    options.add_argument("--docs", type=Path, default=DOCS)
    options = options.parse_args()
    torch.set_num_threads(1)
    where, results = environment(), []
    for arm in arms():
        if not options.arms or {arm.name, file_of(arm.name)} & set(options.arms):
            results.append(measure(arm, options.steps, options.seeds))
            print(" | ".join(row(results[-1])), file=sys.stderr, flush=True)
    content = json.loads(
        json.dumps(
            {"benchmark": NAME, "environment": where, "steps": options.steps, "seeds": options.seeds, "arms": results}
        )
    )
    if not options.arms:
        write(content, options.output, options.docs)
    print(report(content))


if __name__ == "__main__":
    main()
