"""`lorakit compress`: an adapter of lower rank, written only if its loss on held-out rows is as good."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import CheckError, UsageError
from .output import json_result, notices, result, table

if TYPE_CHECKING:
    from ..analysis.compress import Compressed
    from ..theory.number import Number
    from .opened import Opened

CALIBRATION_ROWS = 128
SHOWN = 12


def compress(
    adapter: str = typer.Argument(..., metavar="ADAPTER", help="Adapter or run directory.", show_default=False),
    rank: int = typer.Option(None, "--rank", "-r", help="Rank of every module."),
    tol: float = typer.Option(
        None, "--tol", help="Or: per module the least rank that discards this share of the energy."
    ),
    output: Path = typer.Option(None, "--output", "-o", help="Directory to write; without it nothing is written."),
    calib: str = typer.Option(None, "--calib", help="Rows to measure the layers' inputs on: cut what these see least."),
    data: str = typer.Option(None, "--eval", "-d", help="Held-out rows to measure the loss on, before and after."),
    max_loss_increase: float = typer.Option(
        0.01, "--max-loss-increase", help="Nats; more is exit code 8, nothing written."
    ),
    rows: int = typer.Option(128, "--rows", min=0, help="Rows of --eval, evenly spaced; 0 for all."),
    force: bool = typer.Option(False, "--force", help="Write without a measured loss."),
    base: str = typer.Option(None, "--base", "--model", help="Base model, if not the one the adapter names."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the directory if it exists."),
    every: bool = typer.Option(False, "--all", help="Show every module, not only the ones with the largest error."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Cut an adapter to a lower rank.

    By its SVD, or with --calib so that the outputs on these rows change least. The errors in weights and outputs are exact and
    say little about the loss, so writing needs --eval, which measures it on the files that are written, or --force.
    """
    from ..analysis.compress import Cut
    from ..analysis.compress import compress as cut_to
    from .machine import set_threads
    from .opened import open_model, require_adapter
    from .weights import base_for, open_adapter

    cut, found = Cut(rank, tol), require_adapter(adapter)
    _check(output, found, gated=data is not None or force, overwrite=overwrite)
    set_threads()
    loaded = open_adapter(found, base)
    weights = base_for(found, base) if base or any(m.needs_base for m in loaded) else None
    opened = None
    if data is not None or calib is not None:
        opened = open_model(str(found), base=base, dtype="float32", classify=True)
    moments = None if calib is None or opened is None else input_moments(opened, calib, [m.layer for m in loaded])
    made = cut_to(loaded, cut, weights, moments)
    losses: Mapping[str, Number] = {}
    with tempfile.TemporaryDirectory() as scratch:
        from ..analysis.compress import as_lora
        from ..analysis.lora_files import write_lora

        write_lora(Path(scratch), as_lora(loaded, made, weights), tokenizer_of=found)
        if data is not None and opened is not None:
            losses = measure(opened, Path(scratch), data, rows)
        passed = not losses or losses["loss_increase"].value <= max_loss_increase
        if output is not None and passed:
            _place(Path(scratch), output)
    report(made, losses, output if passed else None, every=every, json=json)
    if not passed:
        increase = losses["loss_increase"].value
        raise CheckError(
            f"the loss rises by {increase:.4f}, more than {max_loss_increase:g}; nothing was written",
            fix="a higher rank, the other way to cut (--calib), or a larger --max-loss-increase",
            where=str(found),
        )


def _check(output: Path | None, adapter: Path, *, gated: bool, overwrite: bool) -> None:
    """Raise UsageError for an output that must not be written."""
    if output is None:
        return
    if not gated:
        raise UsageError(
            "no loss would be measured",
            why="the errors in weights and outputs do not say what the compressed adapter is worth",
            fix="--eval DATA measures it and writes only if it is as good; --force writes without",
        )
    if output.resolve() == adapter.resolve() or output.resolve() in adapter.resolve().parents:
        raise UsageError(f"{output} holds the adapter itself", fix="choose another directory")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", fix="choose another directory, or give --overwrite")


def input_moments(opened: "Opened", data: str, layers: list[str]) -> "Mapping[str, Any]":
    """Give E[x x^T] of the inputs of the layers with the adapter at work, each measured when it is asked for."""
    from ..analysis.input_moments import InputMoments
    from .held_out import held_out

    chosen, dataset = held_out(opened, data, None, CALIBRATION_ROWS)
    notices(dataset.stats.notices)
    return InputMoments(opened.model, layers, chosen)


def measure(opened: "Opened", compressed: Path, data: str, rows: int) -> "Mapping[str, Number]":
    """Measure the base, the adapter, and the adapter that was written, on the same rows."""
    from ..analysis.loss_rows import Losses, row_losses
    from ..core.attach import disabled
    from ..interop.adapter_directory import load
    from .held_out import held_out

    chosen, dataset = held_out(opened, data, None, rows)
    notices(dataset.stats.notices)
    before, own = row_losses(chosen), None
    if dataset.labels is None:
        with disabled(opened.model):
            own = row_losses(chosen)
    load(opened.model, compressed, "compressed")
    return Losses(chosen.weights(), own, before, row_losses(chosen)).numbers()


def _place(files: Path, output: Path) -> None:
    """Move what was measured to where it is wanted, whole or not at all."""
    from ..core.files import atomic_directory

    with atomic_directory(output) as work:
        shutil.copytree(files, work, dirs_exist_ok=True)


def report(made: "Compressed", losses: "Mapping[str, Number]", output: Path | None, *, every: bool, json: bool) -> None:
    """Print what was cut and what it costs."""
    from .merge_check import show_losses

    if json:
        loss = {name: number.json() for name, number in losses.items()} or None
        json_result({**made.json(), "loss": loss, "written": None if output is None else str(output)})
        return
    worst = sorted(made.modules, key=lambda m: -m.numbers["weight_error"].value)
    shown = worst if every else worst[:SHOWN]
    names = ("weight_error", "spectral_error", *(["output_error"] if "output_error" in made.numbers else []))
    lines: list[tuple[object, ...]] = [("module", "rank", "now", *(name.replace("_", " ") for name in names))]
    for m in shown:
        cells = [f"{m.numbers[name].value:.3g}" if name in m.numbers else "" for name in names]
        lines.append((m.module.path, m.module.rank or "-", len(m.A), *cells))
    if len(worst) > len(shown):
        lines.append((f"{len(worst) - len(shown)} more, less error", *[""] * (len(names) + 2)))
    whole = [f"{made.numbers[name].value:.3g}" if name in made.numbers else "" for name in names]
    lines.append(("all, by energy", "", "", *whole))
    result(table(lines))
    before, after = made.parameters
    result(f"\nparameters {before:,} -> {after:,}" if before else f"\nparameters {after:,}")
    if "predicted_lost_gain" in made.numbers:
        predicted = made.numbers["predicted_lost_gain"]
        result(
            f"share of the gain lost, predicted: {predicted.value:.3g} [heuristic; measured: {predicted.inputs['seen']}]"
        )
    for text in made.notes:
        result(f"note: {text}")
    show_losses(losses, "compressed")
    result(f"\n{output}: written" if output is not None else "\nnothing was written")
