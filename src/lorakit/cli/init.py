"""`lorakit init`: a commented configuration for the user's own data."""

from pathlib import Path

import typer

from ..core.errors import UsageError
from .output import note, notices, result
from .rows import Source, default_model, tokenised

# Rows up to which so many passes over the data are suggested: small sets need several, large ones learn in one.
EPOCHS = ((2_000, 3), (20_000, 2))
STEP = 64  # max_length is rounded up to a multiple: a later row may be a little longer


def init(
    data: str = typer.Argument(..., metavar="DATA", help="Training data: file or directory.", show_default=False),
    output: Path = typer.Option(Path("train.yaml"), "--output", "-o", help="File to write."),
    model: str = typer.Option(None, "--model", help="Base model; a built-in one that suits the data when absent."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the file if it exists."),
) -> None:
    """Write a short, commented train.yaml for your data."""
    from ..core.files import atomic_write
    from ..train.config_file import load

    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", fix="choose another file with -o, or give --overwrite")
    text, said = configuration(data, model or default_model(data))
    atomic_write(output, text)
    load(output)  # what is written must be readable
    notices(said)
    result(text.rstrip())
    note(f"\nwrote {output}. Next: lorakit data preview {output}; lorakit plan {output}; lorakit train {output}")


def configuration(data: str, model: str) -> tuple[str, list[str]]:
    """Give the text of a configuration that suits the data, and what a user should know about the data."""
    from ..data import splits
    from ..train.config import SECTIONS, TrainOptions
    from ..train.config_file import default_output, flow
    from ..train.config_schema import section_keys

    dataset, _ = tokenised(Source(data, model, skip_bad_rows=True))
    stats = dataset.stats
    epochs = next((count for rows, count in EPOCHS if len(dataset) <= rows), 1)
    own = "valid" in splits(data)
    max_length = -(-dataset.max_length // STEP) * STEP
    r = section_keys("method")["r"].default
    lr = SECTIONS["optim"].lr
    lines = [
        ("# lorakit train FILE runs this; lorakit plan FILE first says what it needs; --help lists every key.", ""),
        (f"model: {flow(model)}", "built-in name, directory or hub id"),
        ("data:", ""),
        (f"  path: {flow(data)}", f"{stats.rows:,} rows: {dataset.format}"),
        (
            f"  valid: {'null' if own else 0.1}",
            "the data's own validation file" if own else "part held out to validate on",
        ),
        ("method:", ""),
        (f"  r: {r}", "rank; alpha is 2r unless given"),
        ("  target_modules: all-linear", "every linear layer except the output head"),
        ("optim:", ""),
        (f"  lr: {lr}", "peak learning rate"),
        ("train:", ""),
        (f"  epochs: {epochs}", f"passes over {stats.tokens:,} tokens"),
        (f"  batch_size: {TrainOptions.batch_size}", "rows per step"),
        (
            f"  max_length: {max_length}",
            f"tokens; longest row {stats.length_max}, 99 % at most {stats.length_p99}",
        ),
        (f"output: {flow(default_output(data))}", "directory of the run"),
    ]
    if stats.dropped:
        lines.insert(5, ("  skip_bad_rows: true", f"{stats.dropped} of {stats.rows} rows cannot be used"))
    width = max(len(line) for line, comment in lines if comment)
    return "".join(f"{line.ljust(width)}  # {c}\n" if c else f"{line}\n" for line, c in lines), stats.notices
