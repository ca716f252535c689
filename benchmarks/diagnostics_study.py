"""What `strength`, `advise`, `sharpness` and `train.diagnose` say of runs that went well and of runs that did not.

    python benchmarks/diagnostics_study.py                        # the synthetic part, under three minutes on one core
    python benchmarks/diagnostics_study.py --data DIR             # and E2E on SmolLM2 (DIR holds devset.csv), under 25 on two

Four kinds of run on three seeds: good, too hot (a rate 30 times as high), overfit (a few rows, many passes) and undertrained (a
tenth of the steps). Each is watched while it trains and measured on held-out rows after it. Then the good and the undertrained ones
are run twice as long, which is what "undertrained" promises something of, and the gain of training by rank is compared with
the share of the gradient that a probe of the base model gives each rank before. Restartable: a run whose result is
in the JSON file is not repeated.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _common import RESULTS, environment, measured_with, table, write_json
from _study_tasks import KINDS, Study, e2e, synthetic

NAME = "diagnostics_study"
EXPECTED: Mapping[str, frozenset[str]] = {
    "good": frozenset(),
    "too hot": frozenset({"learning_rate_high", "update_large", "diverged", "too_strong"}),
    "overfit": frozenset({"overfit", "too_strong", "rising"}),
    "undertrained": frozenset({"undertrained"}),
}
"""One of these a kind of run should be told, and none of the others."""
WORTH = 0.05
"""Share of the held-out loss by which twice the steps must lower it for them to be called worth it."""


class Trained(NamedTuple):
    """A run: its directory, its records, and whether it stopped as diverged."""

    output: Path
    records: list[dict[str, Any]]
    diverged: bool


def train(study: Study, work: Path, kind: str, seed: int, rank: int | None = None, times: int = 1) -> Trained:
    """Train one run, `times` as long."""
    from lorakit.core.errors import DivergenceError
    from lorakit.train.config_file import loads
    from lorakit.train.progress import Progress
    from lorakit.train.run import run

    changes = dict(study.runs[kind])
    path = study.few if changes.pop("data.path", None) == "few" else study.train
    output = work / "-".join(
        (study.name, *kind.split(), str(seed), *([str(rank)] if rank else []), *["longer"] * (times - 1))
    )
    settings = {
        "model.name": study.model,
        "data.path": str(path),
        "data.valid": str(study.valid),
        **study.settings,
        "train.diagnose": True,
        "train.seed": seed,
        **changes,
        "output": str(output),
    }
    settings["train.max_steps"] *= times
    if rank is not None:
        settings |= {"method.r": rank, "method.alpha": 2 * rank}
    config, _ = loads("", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    diverged = False
    with Progress(0, sys.stderr, live=False, seconds=1e9) as quiet:
        quiet._write = lambda text: None  # type: ignore[method-assign]
        try:
            run(config, overwrite=True, progress=quiet)
        except DivergenceError:
            diverged = True
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return Trained(output, records, diverged)


def one_run(study: Study, work: Path, kind: str, seed: int) -> dict[str, Any]:
    """Train and measure one run."""
    began = time.perf_counter()
    output, records, diverged = train(study, work, kind, seed)
    found = watched(records) | {"kind": kind, "seed": seed}
    if diverged:  # there is no adapter to measure
        found["alarms"] = sorted({*found["alarms"], "diverged"})
    else:
        found |= measured(study, output)
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def watched(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Give what the run said of itself."""
    evaluated = [r for r in records if "eval_loss" in r]
    last = evaluated[-1] if evaluated else {}
    return {
        "steps": len([r for r in records if "loss" in r]),
        "train_loss": [r["loss"] for r in records if "loss" in r][-1],
        "eval_loss": last.get("eval_loss"),
        "eval_slope": last.get("eval_slope"),
        "gain_ratios": [r["gain_ratio"] for r in records if "gain_ratio" in r],
        "rho": [r["rho"] for r in records if "rho" in r][-1],
        "rho_step": max(r["rho_step"] for r in records if "rho_step" in r),
        "bits_per_parameter": last.get("bits_per_parameter"),
        "curve_exponent": last.get("curve_exponent"),
        "alarms": sorted({name for r in records for name in r.get("alarms", [])}),
    }


def measured(study: Study, output: Path) -> dict[str, Any]:
    """Give what the commands say of the adapter."""
    from lorakit.analysis.strength import measure
    from lorakit.analysis.strength_judgements import judged
    from lorakit.cli.held_out import held_out
    from lorakit.cli.opened import open_model

    opened = open_model(str(output), base=study.model, dtype="float32")
    task, _ = held_out(opened, str(study.valid), None, study.strength_rows)
    retain, _ = held_out(opened, str(study.retain), None, study.strength_rows)
    found = judged(measure(opened.model, "default", task, retain))
    best, kls = found.task.best(), found.task.kls() or {}
    damage = found.retain.over_base(1.0) if found.retain else None
    return {
        "best_strength": best.json(),
        "slope": found.slope.json(),
        "elasticity": found.elasticity().json(),
        "mismatch": found.mismatch,
        "gain": found.task.gain(1.0).json(),
        "kl": kls[1.0].json(),
        "forgetting": None if damage is None else damage.json(),
        "judgements": [j.name for j in found.judgements],
        "sharpness": sharp(study, opened, output) if study.sharpness else None,
    }


def sharp(study: Study, opened: Any, output: Path) -> float | None:
    """Give lr times the preconditioned sharpness over 38 at the checkpoint in the middle of the run."""
    from lorakit.analysis.sharpness import sharpness
    from lorakit.cli.held_out import held_out
    from lorakit.cli.sharpness import gradient_of, state_of
    from lorakit.core.attach import trainable
    from lorakit.core.errors import LorakitError

    checkpoint = min((output / "checkpoints").iterdir(), default=None)
    if checkpoint is None:
        return None
    rows, _ = held_out(opened, str(study.train), None, 32)
    trainable(opened.model, "default")
    parameters = [p for p in opened.model.parameters() if p.requires_grad]
    try:
        adam = state_of(opened.model, checkpoint, parameters)
        ratio = sharpness(parameters, gradient_of(rows, parameters), steps=12, adam=adam).ratio
    except LorakitError:
        return None
    return None if ratio is None else ratio.value


def by_rank(study: Study, work: Path, seed: int, rank: int) -> dict[str, Any]:
    """Train the good run with another rank."""
    began = time.perf_counter()
    records = train(study, work, "good", seed, rank).records
    loss = [r["eval_loss"] for r in records if "eval_loss" in r][-1]
    return {"seed": seed, "rank": rank, "eval_loss": loss, "seconds": round(time.perf_counter() - began, 1)}


def longer(study: Study, work: Path, kind: str, seed: int) -> dict[str, Any]:
    """Train a run twice as long."""
    records = train(study, work, kind, seed, times=2).records
    return {"kind": kind, "seed": seed, "eval_loss": [r["eval_loss"] for r in records if "eval_loss" in r][-1]}


def predicted(study: Study) -> dict[str, Any]:
    """Probe the base model, and measure its loss on the validation rows."""
    import torch

    from lorakit.analysis.advice import advise
    from lorakit.analysis.probe import places, probe
    from lorakit.cli.held_out import held_out
    from lorakit.cli.opened import open_model
    from lorakit.core.target import Target

    began = time.perf_counter()
    opened = open_model(study.model, dtype="float32")
    rows, _ = held_out(opened, str(study.train), None, study.probe_rows)
    advice = advise(probe(opened.model, places(opened.model, Target()), rows))
    valid, _ = held_out(opened, str(study.valid), None, 0)
    with torch.no_grad():
        sums = [float(valid.predict(batch).losses().sum()) for batch in valid.batches()]
    return {
        "curve": {str(r): number.json() for r, number in advice.curve.items()},
        "rank": advice.rank,
        "band": list(advice.band),
        "silent": len(advice.silent),
        "modules": len(advice.shares),
        "noise_scale": advice.noise.batch,
        "choices": {c.name: (c.rank, None if c.share is None else c.share.value) for c in advice.choices},
        "base_loss": sum(sums) / float(valid.weights().sum()),
        "seconds": round(time.perf_counter() - began, 1),
    }


def perform(study: Study, work: Path, seeds: Sequence[int], results: dict[str, Any], file: Path) -> None:
    """Do what is not in the results yet, and write them after each run."""
    own = results.setdefault(study.name, {"runs": {}, "ranks": {}})
    for seed in seeds:
        for kind in KINDS:
            if f"{kind} {seed}" not in own["runs"]:
                say(f"{study.name}: {kind}, seed {seed}")
                own["runs"][f"{kind} {seed}"] = one_run(study, work, kind, seed)
                write_json(file, results)
    for seed in seeds:
        for kind in ("good", "undertrained"):
            if f"{kind} {seed}" not in own.setdefault("longer", {}):
                say(f"{study.name}: {kind}, seed {seed}, twice as long")
                own["longer"][f"{kind} {seed}"] = longer(study, work, kind, seed)
                write_json(file, results)
    if "predicted" not in own:
        say(f"{study.name}: probe")
        own["predicted"] = predicted(study)
        write_json(file, results)
    for rank in study.ranks:
        if str(rank) not in own["ranks"]:
            say(f"{study.name}: rank {rank}")
            own["ranks"][str(rank)] = by_rank(study, work, seeds[0], rank)
            write_json(file, results)


def say(text: str) -> None:
    """Show how far it is."""
    print(text, file=sys.stderr, flush=True)


# --- the page ------------------------------------------------------------------------------------------------------------------


def told(run: Mapping[str, Any]) -> set[str]:
    """Give everything a run was told, by its alarms and after it; not what an alarm said that was given up since."""
    from lorakit.theory.alarms import RULES

    known = {rule.name for rule in RULES} | {"diverged"}
    return {*(known & {*run["alarms"]}), *run.get("judgements", ())}


def given_up(runs: Sequence[Mapping[str, Any]]) -> str:
    """Say which alarms these runs had that the program no longer has, and where they were on."""
    every: dict[str, list[str]] = {}
    for run in runs:
        for name in {*run["alarms"]} - told({**run, "judgements": ()}):
            every.setdefault(name, []).append(f"{run['kind']} {run['seed']}")
    return "".join(
        f"An alarm `{name}`, given up since, was on in: {', '.join(where)}.\n" for name, where in sorted(every.items())
    )


def page(results: Mapping[str, Any]) -> str:
    """Write the results in words and tables."""
    lines = [
        "# What the diagnostics say of good and of bad runs\n",
        "Made by `benchmarks/diagnostics_study.py`. Four kinds of run on each seed; thresholds are those of `theory/thresholds.py`. "
        "They were set on other runs, except those of `update large` and `undertrained`, which were set on the synthetic part of this "
        "study: their hits there prove nothing.\n",
    ]
    for name in ("synthetic", "smollm2"):
        if name in results:
            lines += [f"## {name}\n", *section(results[name])]
    return "\n".join([*lines, measured_with(results["environment"])])


def section(own: Mapping[str, Any]) -> list[str]:
    """Write one task."""
    runs = sorted(own["runs"].values(), key=lambda r: (KINDS.index(r["kind"]), r["seed"]))
    meant = [r for r in runs if EXPECTED[r["kind"]]]
    right = [r for r in meant if EXPECTED[r["kind"]] & told(r)]
    every = frozenset().union(*EXPECTED.values())
    wrong = [
        f"{name} in {r['kind']}, seed {r['seed']}"
        for r in runs
        for name in sorted(told(r) & every - EXPECTED[r["kind"]])
    ]
    missed = [f"{r['kind']}, seed {r['seed']}" for r in meant if r not in right]
    text = (
        f"Told what it should be: {len(right)} of {len(meant)} bad runs; not told: {'; '.join(missed) or 'none'}. "
        f"Told what it should not be: {'; '.join(wrong) or 'none'}.\n"
    )
    lines = [fired(runs), text.replace("_", " ")]
    lines += [given_up(runs)] if given_up(runs) else []
    lines += ["### Each run\n", each(runs)]
    if own.get("longer"):
        lines += ["### Twice as long\n", twice(own)]
    if "predicted" in own and own["ranks"]:
        lines += ["### Gain by rank\n", ranks(own)]
    return lines


def fired(runs: Sequence[Mapping[str, Any]]) -> str:
    """Give kind against what was said, in how many of its runs."""
    names = sorted({name for r in runs for name in told(r)})
    rows = []
    for kind in KINDS:
        of = [r for r in runs if r["kind"] == kind]
        counts = [sum(name in told(r) for r in of) for name in names]
        rows.append([kind, *(f"{count} of {len(of)}" if count else "-" for count in counts)])
    return table(["run", *(name.replace("_", " ") for name in names)], rows)


def each(runs: Sequence[Mapping[str, Any]]) -> str:
    """Give the figures of each run."""
    header = [
        "run",
        "seed",
        "train loss",
        "held-out loss",
        "gain ratio, median",
        "largest step",
        "curve exponent",
        "dL/dγ",
        "best γ (95 %)",
        "elasticity",
        "gain",
        "KL",
    ]
    header += ["forgetting", "ρ", "lr λ/38", "bits/param", "mismatch"]
    return table(header, [_each(r) for r in runs])


def _each(r: Mapping[str, Any]) -> list[str]:
    ratios = sorted(q for q in r["gain_ratios"] if q is not None)

    def shown(key: str, form: str) -> str:
        """Give a figure, or a dash where a run that diverged has none."""
        value = r.get(key)
        value = value["value"] if isinstance(value, dict) else value
        return "-" if value is None else format(value, form)

    best = "-"
    if "best_strength" in r:
        low, high = r["best_strength"]["ci"]
        best = f"{shown('best_strength', '.2f')} ({low:.2f} to {high:.2f})"
    return [
        r["kind"],
        str(r["seed"]),
        shown("train_loss", ".3f"),
        shown("eval_loss", ".3f"),
        f"{ratios[len(ratios) // 2]:.2f}" if ratios else "-",
        shown("rho_step", ".2g"),
        shown("curve_exponent", "+.2f"),
        shown("slope", "+.3f"),
        best,
        shown("elasticity", ".2f"),
        shown("gain", ".3f"),
        shown("kl", ".3f"),
        shown("forgetting", "+.3f"),
        shown("rho", ".2g"),
        shown("sharpness", ".2g"),
        shown("bits_per_parameter", ".2g"),
        shown("mismatch", ".0e"),
    ]


def twice(own: Mapping[str, Any]) -> str:
    """Give what twice the steps brought, beside what the runs said of it."""
    rows, right = [], 0
    for name, other in sorted(own["longer"].items()):
        run = own["runs"][name]
        fell, said = 1 - other["eval_loss"] / run["eval_loss"], "undertrained" in told(run)
        right += (fell > WORTH) == said
        about = [f"{run['curve_exponent']:+.3f}", f"{run['elasticity']['value']:+.2f}", "yes" if said else "no"]
        rows.append(
            [
                run["kind"],
                str(run["seed"]),
                *about,
                f"{run['eval_loss']:.3f}",
                f"{other['eval_loss']:.3f}",
                f"{100 * fell:+.1f} %",
            ]
        )
    header = [
        "run",
        "seed",
        "curve exponent",
        "elasticity",
        "told undertrained",
        "held-out loss",
        "twice as long",
        "lower by",
    ]
    text = f"Told right, if a fall by more than {WORTH:.0%} is worth the steps: {right} of {len(rows)}.\n"
    return table(header, rows) + "\n" + text


def ranks(own: Mapping[str, Any]) -> str:
    """Give the gain that the probe predicts by rank, as a share of the largest rank's, against what training gave."""
    found = own["predicted"]
    most = max(own["ranks"], key=int)
    whole, top = found["base_loss"] - own["ranks"][most]["eval_loss"], found["curve"][most]["value"]
    rows, errors = [], []
    for rank in sorted(own["ranks"], key=int):
        said, was = found["curve"][rank]["value"] / top, (found["base_loss"] - own["ranks"][rank]["eval_loss"]) / whole
        errors.append(abs(said - was))
        low, high = found["curve"][rank]["ci"]
        rows.append(
            [rank, f"{found['curve'][rank]['value']:.3f} ({low:.3f} to {high:.3f})", f"{said:.2f}", f"{was:.2f}"]
        )
    text = (
        f"Before training the probe advises rank {found['rank']} (band {found['band'][0]} to {found['band'][1]}); base loss "
        f"{found['base_loss']:.3f}, gain of rank {most} {whole:.3f}. Largest difference of the last two columns: {max(errors):.2f}.\n"
    )
    return (
        table(["rank", "captured (95 %)", f"predicted, of rank {most}", f"gained, of rank {most}"], rows) + "\n" + text
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument(
        "--data", type=Path, help="the E2E challenge's directory with devset.csv: adds the SmolLM2 part"
    )
    options.add_argument("--model", default="smollm2", help="model of that part")
    options.add_argument("--output", type=Path, default=RESULTS, help="directory of the results")
    options.add_argument("--keep", type=Path, help="directory for the runs and their data, which then stay")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = options.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / f"{NAME}.json"
    results = json.loads(file.read_text()) if file.exists() else {"environment": environment()}
    for name in ("synthetic", *(["smollm2"] if given.data else [])):
        with contextlib.ExitStack() as stack:
            work = (given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))) / name
            work.mkdir(parents=True, exist_ok=True)
            study = synthetic(work) if name == "synthetic" else e2e(work, given.data, given.model)
            perform(study, work, given.seeds, results, file)
    (given.output / f"{NAME}.md").write_text(page(results))
    print(given.output / f"{NAME}.md")


if __name__ == "__main__":
    main()
