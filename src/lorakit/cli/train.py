"""`lorakit train`: one run, from a configuration file, from flags, or from both."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from ..core.errors import UsageError
from .output import json_result, note, notices, result, table

ARGUMENTS = typer.Argument(None, metavar="[CONFIG.yaml] [KEY=VALUE ...]", show_default=False)
HELP = typer.Option(False, "--help", "-h", is_eager=True, help="Show this message and the configuration keys.")


def train(
    context: typer.Context,
    arguments: list[str] = ARGUMENTS,
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Delete what an earlier run left in the output directory."
    ),
    resume: bool = typer.Option(False, "--resume", help="Insist on going on with an unfinished run."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say what would be done (as `lorakit plan`)."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    help: bool = HELP,
) -> None:
    """Train an adapter. Every configuration key is also a flag: --lr 1e-4, --method.r 8, --max-steps 60.

    The same command on an unfinished run goes on with it; on a finished one it refuses without --overwrite.
    """
    from ..train.config_file import load, place_of
    from .machine import set_threads
    from .overrides import help_text, split

    if help or not arguments:
        typer.echo(f"{context.get_help()}\n\n{help_text()}")
        raise typer.Exit(0 if help else 2)
    file, overrides = split(arguments)
    config, said = load(file, overrides)
    notices(said)
    threads = set_threads()
    if dry_run:
        from .plan import show

        show(config, json=json)
        return
    directory = Path(config.output)
    if resume and not any((directory / "checkpoints").glob("step-*")):
        raise UsageError(f"--resume: {directory} holds no unfinished run with a checkpoint", fix="leave --resume out")
    note(f"training in {directory} ({threads} threads)")
    from ..api import run

    try:
        done = run(config, overwrite=overwrite)
    except UsageError as error:  # what the model or the data refuses has a line in the file too
        if file is not None and error.where is None:
            error.where = place_of(file, error.what.partition(":")[0])
        raise
    show_result(done, json=json)


def show_result(done: Any, *, json: bool) -> None:
    """Print what a run came to (a train.session.RunResult)."""
    if json:
        json_result(asdict(done))
        return
    loss = "-" if done.loss is None else f"{done.loss:.4f}"
    rows = [("adapter", done.adapter), ("steps", done.steps), ("last loss", loss)]
    rows += [(key.replace("_", " "), f"{value:.4f}") for key, value in done.evaluation.items()]
    rows += [("time", f"{done.seconds:.0f} s"), ("parameters", str(done.summary))]
    result(table(rows))
    note(f"next: lorakit chat {done.adapter} --compare · lorakit report {done.directory}")
