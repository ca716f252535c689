"""`lorakit advise`: rank, layers and rate before training, from the gradient of the base model on the data."""

import math
import sys
from typing import TYPE_CHECKING, Any

import typer

from .generate import DTYPE
from .output import json_result, live, notices, result, table

if TYPE_CHECKING:
    from ..analysis.advice import Advice

LISTED = 6


def advise(
    data: str = typer.Option(..., "--data", "-d", help="The rows to train on: a file or a directory."),
    base: str = typer.Option("smollm2", "--base", "--model", "-m", help="Base model."),
    budget: int = typer.Option(None, "--budget", min=1, help="Trained numbers to spend; compares where to spend them."),
    rows: int = typer.Option(64, "--rows", min=4, help="Rows to look at, evenly spaced."),
    format: str = typer.Option(None, "--format", help="Form of the rows; found by looking when absent."),
    max_length: int = typer.Option(None, "--max-length", min=2, help="Tokens kept of a row, as train.max_length."),
    seed: int = typer.Option(0, "--seed", help="Start of the random numbers: halves and sketches."),
    dtype: str = DTYPE,
    quantize: str = typer.Option(None, "--quantize", help="Store the base as model.quantize does, e.g. nf4."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Advise on rank and layers before training.

    Two passes over a few rows, no training: what share of the reproducible gradient each rank would follow, which modules have
    nothing to learn that these rows could show, where a number of parameters is best spent, how large the first step would be
    by rate and rank. Prints a `method:` section for `lorakit train`.
    """
    from ..analysis.advice import advise as advice_of
    from ..analysis.probe import places, probe
    from ..analysis.rowwise import Rows
    from ..core.target import Target
    from .held_out import spread
    from .machine import set_threads

    set_threads()
    encoded, loaded = _open(data, base, format, max_length, dtype, quantize)
    notices(encoded.stats.notices)
    pad = loaded.tokenizer.pad_token_id
    examples = Rows(loaded.model, spread(encoded.examples, rows), pad if pad is not None else 0)
    found = probe(loaded.model, places(loaded.model, Target()), examples, seed=seed, tick=_tick)
    advice = advice_of(found, budget, encoded.stats.trained_tokens)
    if json:
        json_result(as_dict(advice))
    else:
        show(advice)


def as_dict(found: "Advice") -> dict[str, Any]:
    """Give everything for machines."""
    from ..analysis.advice import half_curve, method_block

    modules = found.probe.modules
    return {
        "rows": len(found.probe.half),
        "rank": found.rank,
        "band": list(found.band),
        "captured": {str(r): number.json() for r, number in found.curve.items()},
        "signal": found.signal.json(),
        "modules": {
            m.place.name: {
                "share": found.shares[m.place.name].json(),
                "captured": half_curve(found.probe, m).captured.tolist(),
                "silent": m.place.name in found.silent,
            }
            for m in modules
        },
        "budget": found.budget,
        "choices": [
            {
                "name": c.name,
                "modules": len(c.modules),
                "r": c.rank,
                "parameters": c.parameters,
                "captured": None if c.share is None else c.share.json(),
            }
            for c in found.choices
        ],
        "best_choice": found.best.name,
        "first_steps": [{**step._asdict(), "remark": step.remark} for step in found.first_steps],
        "noise_scale": found.noise._asdict(),
        "tokens_per_parameter": found.capacity.json(),
        "bits_per_parameter_at_most": found.bits.json(),
        "loss": found.probe.loss,
        "notes": list(found.notes),
        "method": method_block(found),
    }


def show(found: "Advice") -> None:
    """Print it for people."""
    from ..analysis.advice import method_block

    n = len(found.probe.half)
    result(f"{n} rows, base loss {found.probe.loss:.4f}; {len(found.probe.modules)} modules\n")
    lines: list[tuple[object, ...]] = [("rank", "captured", "95 %", "random")]
    lines += [(str(r), *_share(c)) for r, c in found.curve.items()]
    result(table(lines))
    result(
        "captured: share of the reproducible gradient that this rank on all layers would follow (estimate); what training gains"
    )
    result("at a rank was seen to be that share or more, never much less (heuristic): a smaller rank may do\n")
    lines = [(f"{found.budget:,} parameters on", "r", "captured", "95 %", "random")]
    for choice in sorted(found.choices, key=lambda c: -(c.share.value if c.share is not None else -math.inf)):
        lines.append((choice.name, str(choice.rank or "-"), *(_share(choice.share) if choice.share else ("-", "", ""))))
    result(table(lines))
    result(
        "between choices this is a first-order picture; a better split between modules gained little where it was tried\n"
    )
    _show_modules(found)
    _show_first_steps(found)
    noise, bits = found.noise, found.bits
    rows = f"{noise.batch:.0f} rows" if math.isfinite(noise.batch) else "not measured: no reproducible gradient"
    result(f"noise scale  {rows}: a step of more rows than that learns little more (order of magnitude)")
    result(
        f"capacity     {found.capacity.value:.2g} trained tokens a parameter at r = {found.used}; at most {bits.value:.2g} bits a "
        f"parameter to be learned in one pass, about {bits.null:g} fit"
    )
    for note in found.notes:
        result(f"note: {note}")
    result("\n" + method_block(found).rstrip())


def _show_modules(found: "Advice") -> None:
    top = sorted(found.shares, key=lambda name: -found.shares[name].value)[:LISTED]
    result(
        table(
            [("modules with most of the signal", "share"), *((name, f"{found.shares[name].value:.1%}") for name in top)]
        )
    )
    silent = found.silent
    if silent:
        more = f" and {len(silent) - LISTED} more" if len(silent) > LISTED else ""
        result(f"no signal that these rows could show in {len(silent)}: {', '.join(silent[:LISTED])}{more}")
    result("")


def _show_first_steps(found: "Advice") -> None:
    rates = sorted({step.lr for step in found.first_steps})
    lines: list[tuple[object, ...]] = [("first Adam step, ||ΔW||/||W||", *(f"lr {lr:g}" for lr in rates))]
    for r, alpha in dict.fromkeys((step.r, step.alpha) for step in found.first_steps):
        row = [step for step in found.first_steps if (step.r, step.alpha) == (r, alpha)]
        lines.append((f"r {r}, alpha {alpha:g}", *(f"{s.rho:.1e} {s.remark}".strip() for s in sorted(row))))
    result(table(lines) + "\n")


def _share(number: Any) -> tuple[str, str, str]:
    low, high = number.interval
    return f"{number.value:.3f}", f"{low:.3f} to {high:.3f}", f"{number.null:.3f}"


def _open(
    data: str, base: str, format: str | None, max_length: int | None, dtype: str, quantize: str | None
) -> tuple[Any, Any]:
    """Read the rows, and load the base model as it would be trained."""
    from ..core.errors import UsageError
    from ..data import encode, find_task, read
    from ..models.load import load

    table_of_rows = read(data, "train")
    task = find_task(table_of_rows, format)
    if task == "classification":
        raise UsageError(
            "a classifier's base model has no trained head, and the gradient through a random one says nothing",
            fix="train with the usual r = 8 to 16 on all linear layers",
        )

    def prepare(model: Any, head: list[str]) -> None:
        if quantize is not None:
            from ..models.quantize import quantize as store

            store(model, quantize, modules_to_save=None)

    loaded = load(base, dtype=dtype, prepare=prepare)
    limit = loaded.model.config.get_text_config().to_dict().get("max_position_embeddings")
    encoded = encode(
        table_of_rows, loaded.tokenizer, task=task, format=format, max_length=max_length, model_limit=limit
    )
    return encoded, loaded


def _tick(done: int, of: int) -> None:
    """Show on a terminal how far it is."""
    if live(sys.stderr):
        sys.stderr.write(f"\r{done} of {of} passes" + ("\n" if done == of else ""))
        sys.stderr.flush()
