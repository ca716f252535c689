"""`lorakit data ...`: look at rows as the training will see them."""

import json as jsonlib
import sys
from pathlib import Path

import typer

from ..core.errors import UsageError
from .output import json_result, notices, result, style, styled, table
from .rows import source, tokenised

app = typer.Typer(help="Look at data: preview, stats, split.", no_args_is_help=True, rich_markup_mode=None)

PATH = typer.Argument(..., metavar="PATH", help="Data file or directory, or a configuration file.", show_default=False)
MODEL = typer.Option(None, "--model", help="Whose tokenizer to use; a built-in one that suits when absent.")
TASK = typer.Option(None, "--task", help="sft, completion or classification; found by looking when absent.")
FORMAT = typer.Option(None, "--format", help="Form of the rows; found by looking when absent.")
LENGTH = typer.Option(None, "--max-length", min=2, help="Tokens kept of a row.")
JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command()
def preview(
    path: str = PATH,
    rows: int = typer.Option(3, "--rows", "-n", min=1, help="How many rows."),
    model: str = MODEL,
    task: str = TASK,
    format: str = FORMAT,
    max_length: int = LENGTH,
    json: bool = JSON,
) -> None:
    """Show rows as the model gets them.

    What is trained is green, or stands in [[ ]] where there is no colour.
    """
    from ..data import preview as segments
    from ..data import to_plain

    where = source(path, model, task, format, max_length)
    dataset, tokenizer = tokenised(where)
    shown = segments(dataset, tokenizer, rows)
    if json:
        json_result(
            [
                {"where": example.where, "segments": [{"text": t, "trained": on} for t, on in runs]}
                for example, runs in zip(dataset.examples[:rows], shown, strict=True)
            ]
        )
        return
    share = dataset.stats.trained_tokens / max(dataset.stats.tokens, 1)
    trained = f", {share:.0%} trained" if dataset.labels is None else f", {len(dataset.labels)} classes"
    result(f"{path}: {len(dataset)} rows · {dataset.format} · {dataset.task} · tokenizer {where.model}{trained}")
    for example, runs in zip(dataset.examples[:rows], shown, strict=True):
        text = colored(runs) if styled(sys.stdout) else to_plain(runs)
        result(f"\n{style(f'{example.where}, {len(example.input_ids)} tokens', 'bold', sys.stdout)}\n{text}")
    notices(dataset.stats.notices)


@app.command()
def stats(
    path: str = PATH,
    model: str = MODEL,
    task: str = TASK,
    format: str = FORMAT,
    max_length: int = LENGTH,
    json: bool = JSON,
) -> None:
    """Count rows and tokens.

    Also lists what was cut, dropped or looks odd.
    """
    from dataclasses import asdict

    where = source(path, model, task, format, max_length)
    dataset, _ = tokenised(where)
    counts = asdict(dataset.stats)
    bad, notes = counts.pop("bad_rows"), counts.pop("notices")
    facts = {"format": dataset.format, "task": dataset.task, "tokenizer": where.model}
    if json:
        checks = asdict(dataset.facts)
        labels = {"labels": dataset.labels, "fingerprint": dataset.fingerprint}
        json_result({**facts, **counts, **labels, "checks": checks, "bad_rows": bad, "notices": notes})
        return
    result(table([*facts.items(), *((key.replace("_", " "), value) for key, value in counts.items())]))
    for row in bad[:20]:
        result(f"not used: {row['where']}  {row['reason']}")
    if len(bad) > 20:
        result(f"not used: {len(bad) - 20} more")
    notices(notes)


@app.command()
def split(
    path: str = typer.Argument(..., metavar="PATH", help="Data file.", show_default=False),
    output: Path = typer.Option(..., "--output", "-o", help="Directory to make."),
    valid: float = typer.Option(0.1, "--valid", help="Fraction of the rows for validation."),
    seed: int = typer.Option(0, "--seed", help="Another seed draws other rows."),
) -> None:
    """Split rows into train.jsonl and valid.jsonl.

    Equal rows stay on one side.
    """
    from ..core.files import atomic_directory
    from ..data import hold_out, read

    if output.exists():
        raise UsageError(f"{output} exists", fix="choose a new directory")
    parts = dict(zip(("train", "valid"), hold_out(read(path), valid, seed), strict=True))
    with atomic_directory(output) as work:
        for name, rows in parts.items():
            lines = (jsonlib.dumps(row.fields, ensure_ascii=False) + "\n" for row in rows)
            (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    result(f"{output}: {len(parts['train'])} rows in train.jsonl, {len(parts['valid'])} in valid.jsonl")


def colored(runs: list[tuple[str, bool]]) -> str:
    """Give a row in colour: green is trained, grey is not."""
    from io import StringIO

    from rich.console import Console

    from ..data import to_rich

    console = Console(file=StringIO(), force_terminal=True, width=10**6, color_system="standard", soft_wrap=True)
    with console.capture() as captured:
        console.print(to_rich(runs), end="", soft_wrap=True)
    return captured.get()
