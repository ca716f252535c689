"""`lorakit plan`: what a run would do and need, before it does."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import ResourceError
from .output import json_result, notices, result, table

if TYPE_CHECKING:
    from ..train.config import RunConfig
    from .planning import Plan

ARGUMENTS = typer.Argument(None, metavar="[CONFIG.yaml] [KEY=VALUE ...]", show_default=False)
HELP = typer.Option(False, "--help", "-h", is_eager=True, help="Show this message and the configuration keys.")
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "temporary", "runtime")


def plan(
    context: typer.Context,
    arguments: list[str] = ARGUMENTS,
    json: bool = typer.Option(False, "--json", help="Print JSON."),
    help: bool = HELP,
) -> None:
    """Say what a run would do and need.

    Rows, steps, parameters, memory by part and a rough duration; no weight is loaded. Takes what `train` takes and
    exits with 5 if the memory that is free would not do.
    """
    from ..train.config_file import load
    from .machine import set_threads
    from .overrides import help_text, split

    if help or not arguments:
        typer.echo(f"{context.get_help()}\n\n{help_text()}")
        raise typer.Exit(0 if help else 2)
    config, said = load(*split(arguments))
    notices(said)
    set_threads()
    show(config, json=json)


def show(config: "RunConfig", *, json: bool) -> None:
    """Print the plan of a run; ResourceError if the memory that is free would not do."""
    from .planning import make_plan

    made = make_plan(config)
    if json:
        json_result(made.as_dict())
    else:
        result(text(config, made))
        notices([*made.data.stats.notices, *made.advice])
    if not made.fits:
        raise ResourceError(
            f"this needs about {made.need.total / 1e9:.1f} GB, and {made.available / 1e9:.1f} GB are free",
            fix="; ".join(savings(config, made)),
        )


def text(config: "RunConfig", made: "Plan") -> str:
    """Write the plan for people."""
    stats, need = made.data.stats, made.need
    valid = f", {len(made.valid)} to validate" if made.valid else ""
    trained = f", {stats.trained_tokens / stats.tokens:.0%} trained" if made.data.labels is None else ""
    parts = " · ".join(f"{name} {gigabytes(vars_of(need)[name])}" for name in PARTS if vars_of(need)[name] >= 1e6)
    passes = made.steps * made.rows_per_step / len(made.data)
    longest = f"longest row {max(made.data.lengths)} of {made.data.max_length} allowed"
    rows = [
        ("model", f"{config.model.name} in {made.dtype}"),
        ("data", f"{len(made.data):,} rows{valid} · {made.data.format} · {made.data.task}"),
        (
            "",
            f"{stats.tokens:,} tokens{trained} · {longest}",
        ),
        ("adapter", str(made.summary).partition(": ")[2]),
        ("steps", f"{made.steps} of {made.rows_per_step} rows ({passes:.1f} passes)"),
        ("memory", f"{gigabytes(need.total)} GB at the peak, {gigabytes(made.available)} GB free"),
        ("", parts),
        *([("", made.choice.words)] if made.choice else []),
        ("time", f"roughly {duration(made.seconds)}, evaluations not counted"),
        ("output", config.output),
    ]
    return table(rows)


def savings(config: "RunConfig", made: "Plan") -> list[str]:
    """Give the settings that need less, with what each saves."""
    from ..models import resolve
    from ..train.need import requirement
    from .planning import adapted_skeleton

    tries: list[tuple[str, Any]] = []
    options = config.train
    if options.checkpointing is not True and options.checkpointing != "auto":
        tries.append(("train.checkpointing: true", replace(options, checkpointing=True)))
    if options.batch_tokens is None and options.batch_size > 1:
        half = options.batch_size // 2
        smaller = replace(options, batch_size=half, accumulate=options.accumulate * 2)
        tries.append((f"train.batch_size: {half} with train.accumulate: {smaller.accumulate}", smaller))
    found = []
    for words, other in tries:
        changed = replace(config, train=other)
        model, _ = adapted_skeleton(changed, made.data, resolve(config.model.name))
        recomputed = made.recomputed if other.checkpointing == "auto" else other.checkpointing
        saved = made.need.total - requirement(changed, made.data, model, recomputed).total
        found.append(f"{words} (-{gigabytes(saved)} GB)")
    return [*found, "a smaller train.max_length", "a smaller base model"]


def vars_of(need: Any) -> dict[str, int]:
    """Give the parts of an estimate by name."""
    return {name: getattr(need, name) for name in PARTS}


def gigabytes(count: float) -> str:
    """Write bytes in GB."""
    return f"{count / 1e9:.2f}"


def duration(seconds: float) -> str:
    """Write seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
