"""`lorakit sweep`: a grid of runs that differ in rank, rate, seed, trained in one pass over their base."""

import math
from pathlib import Path
from typing import Any

import typer

from .output import json_result, note, notices, result, table

ARGUMENTS = typer.Argument(None, metavar="[CONFIG.yaml] KEY=[V1,V2,...] [KEY=VALUE ...]", show_default=False)
HELP = typer.Option(False, "--help", "-h", is_eager=True, help="Show this message and the configuration keys.")


def sweep(
    context: typer.Context,
    arguments: list[str] = ARGUMENTS,
    overwrite: bool = typer.Option(False, "--overwrite", help="Delete what earlier runs left in their directories."),
    at_once: int = typer.Option(8, "--at-once", min=1, help="How many runs train together."),
    pass_tokens: int = typer.Option(
        None, "--pass-tokens", min=1, help="Tokens of all runs in one pass at most: less memory, and less speed."
    ),
    json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
    help: bool = HELP,
) -> None:
    """Train an adapter for every combination of values: lorakit sweep c.yaml lr=[1e-4,3e-4] r=[4,8] seed=[0,1].

    The runs share the frozen base and each pass over it; each is the run it would be alone, in a directory of its own. They
    may differ in what concerns the adapter and its training, not in model, data and layers. The same command goes on with
    unfinished runs and leaves finished ones alone.
    """
    from .overrides import help_text, split

    if help or not arguments:
        typer.echo(f"{context.get_help()}\n\n{help_text()}")
        raise typer.Exit(0 if help else 2)
    from ..train.grid import grid
    from .machine import set_threads

    found, said = grid(*split(arguments))
    notices(said)
    threads = set_threads()
    parent = Path(next(iter(found.values())).output).parent
    note(f"training {len(found)} runs in {parent}, {min(at_once, len(found))} at once ({threads} threads)")
    from ..analysis.report import write_report
    from ..api import run_many

    named = {f"run-{i}": config for i, config in enumerate(found.values(), start=1)}
    results = run_many(named, overwrite=overwrite, at_once=at_once, pass_tokens=pass_tokens)
    ended = {label: str(results[name]) for name, label in zip(named, found, strict=True) if _failed(results.get(name))}
    write_report([Path(config.output) for config in found.values()], parent / "report.html")
    _show({label: Path(config.output) for label, config in found.items()}, ended, json=json)
    if len(ended) == len(found):
        raise next(error for error in results.values() if isinstance(error, Exception))


def _failed(outcome: Any) -> bool:
    return isinstance(outcome, Exception)


def _show(directories: dict[str, Path], ended: dict[str, str], *, json: bool) -> None:
    """Print what the runs came to, also those that were finished before, the best first."""
    from ..analysis.run_files import read_run

    found: list[dict[str, Any]] = []
    for label, directory in directories.items():
        run = read_run(directory, label)
        losses = [r["eval_loss"] for r in run.evaluations if isinstance(r.get("eval_loss"), int | float)]
        evaluated = losses[-1] if losses else None
        found.append(
            {
                "run": label,
                "steps": run.last_step,
                "loss": run.last("loss"),
                "eval_loss": evaluated,
                "error": ended.get(label),
                "directory": str(directory),
            }
        )
    found.sort(key=lambda r: (r["error"] is not None, _or_last(r["eval_loss"]), _or_last(r["loss"])))
    if json:
        json_result(found)
        return
    evaluates = any(r["eval_loss"] is not None for r in found)
    rows: list[tuple[Any, ...]] = [("run", "steps", "last loss", *(["eval loss"] if evaluates else []), "")]
    for r in found:
        losses = [_shown(r["loss"]), *([_shown(r["eval_loss"])] if evaluates else [])]
        rows.append((r["run"], r["steps"], *losses, (r["error"] or "").partition("\n")[0]))
    result(table(rows))
    parent = next(iter(directories.values())).parent
    note(f"report: {parent / 'report.html'} · next: lorakit chat {found[0]['directory']} --compare")


def _or_last(value: float | None) -> float:
    return math.inf if value is None else value


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
