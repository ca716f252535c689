"""`lorakit merge-check`: what is left of an adapter after it has been merged into weights of few bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import CheckError
from .output import json_result, notices, result, table

if TYPE_CHECKING:
    from ..analysis.loss_rows import Losses
    from ..analysis.merge_check import MergeCheck
    from ..theory.number import Number

SHOWN = 12  # modules of the table


def merge_check(
    adapter: str = typer.Argument(..., metavar="ADAPTER", help="Adapter or run directory.", show_default=False),
    base: str = typer.Option(None, "--base", "--model", help="Base model, if not the one the adapter names."),
    dtype: str = typer.Option(
        "bf16", "--dtype", help="What the merged weights are stored in: bf16 fp16 fp32 nf4 fp4 int8."
    ),
    threshold: float = typer.Option(
        0.98, "--threshold", min=0.0, help="Exit with 8 if less of the update is retained."
    ),
    max_noise: float = typer.Option(
        0.2, "--max-noise", min=0.0, help="Exit with 8 if the noise over the update is more."
    ),
    data: str = typer.Option(
        None, "--eval", "-d", help="Rows to measure the loss of base, adapter and merged model on."
    ),
    rows: int = typer.Option(128, "--rows", min=0, help="Rows of --eval, evenly spaced; 0 for all."),
    every: bool = typer.Option(False, "--all", help="Show every module, not only the worst ones."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Say what merging would do to an adapter.

    W + ΔW is rounded to the grid of the target format; a small update falls between its points. Of every module: how much of
    the update is left and how noisy it is, measured on the base's weights and predicted in closed form beside it, and what
    merging and unmerging leaves behind. Exit code 8 if too little is left.
    """
    from ..analysis.merge_check import merge_check as check
    from ..analysis.stored import find_format
    from .machine import set_threads
    from .opened import require_adapter
    from .weights import base_for, open_adapter

    set_threads()
    target, found = find_format(dtype), require_adapter(adapter)
    weights = base_for(found, base)
    checked = check(open_adapter(found, base), weights, target, retained=threshold, noise=max_noise)
    losses = None if data is None else measure(found, base, target, data, rows)
    numbers = {} if losses is None else losses.numbers()
    if json:
        loss = {name: number.json() for name, number in numbers.items()} or None
        json_result({"adapter": str(found), **checked.json(), "loss": loss})
    else:
        show(checked, numbers, every)
    gate(checked, found)


def measure(adapter: Path, base: str | None, target: str, data: str, rows: int) -> "Losses":
    """Measure the loss of the base, of the adapter beside it and of the merged model, all in float32 arithmetic."""
    from ..analysis.loss_rows import Losses, row_losses
    from ..analysis.stored import FLOATS
    from ..core.attach import detach, disabled
    from ..core.merge import merge
    from ..models.quantize import quantize
    from .held_out import held_out
    from .opened import ADAPTER, open_model

    opened = open_model(str(adapter), base=base, dtype="float32", classify=True, plain=True)
    model: Any = opened.model
    chosen, dataset = held_out(opened, data, None, rows)
    notices(dataset.stats.notices)
    before, own = row_losses(chosen), None
    if dataset.labels is None:  # a classifier's base has no trained head
        with disabled(model):
            own = row_losses(chosen)
    detach(merge(model, ADAPTER, keep=False))
    if target in FLOATS:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(FLOATS[target]).float()
    else:
        quantize(model, target)
    return Losses(chosen.weights(), own, before, row_losses(chosen))


def show(checked: "MergeCheck", losses: "Mapping[str, Number]", every: bool) -> None:
    """Print the modules, worst first, and the whole."""
    shown = checked.modules if every else checked.modules[:SHOWN]
    heading = ("module", "ΔW/W", "retained", "predicted", "noise", "predicted", "unchanged", "unmerge damage")
    lines = [heading, *(_row(m.module.path, m.numbers) for m in shown)]
    if len(checked.modules) > len(shown):
        lines.append((f"{len(checked.modules) - len(shown)} more, less noisy", *[""] * 7))
    lines.append(_row("all, by energy", checked.numbers))
    result(table(lines))
    within = sum(checked.passes(m.numbers) for m in checked.modules if m.energy > 0)
    changed = sum(m.energy > 0 for m in checked.modules)
    limits = f"retained at least {checked.least_retained:g}, noise at most {checked.most_noise:g}"
    result(f"\n{checked.dtype}: {within} of {changed} modules by themselves within the limits ({limits})")
    others = ", ".join(f"{name} {number.value:.3g}" for name, number in checked.elsewhere.items())
    result(f"predicted noise of the whole: {others}")
    for text in checked.notes:
        result(f"note: {text}")
    show_losses(losses, "merged")


def show_losses(losses: "Mapping[str, Number]", after: str) -> None:
    """Print three losses and what lies between them, or that none was measured."""
    if not losses:
        result("loss: not measured (--eval DATA)")
        return
    names = {"loss_base": "base", "loss_before": "adapter", "loss_after": after, "loss_increase": f"{after} - adapter"}
    names["lost_gain"] = "share of the gain lost"
    lines: list[tuple[object, ...]] = [("loss", "", "95 %")]
    for name, title in names.items():
        if name in losses:
            low, high = losses[name].interval or (losses[name].value, losses[name].value)
            lines.append((title, f"{losses[name].value:.4f}", f"{low:.4f} to {high:.4f}"))
    result(f"\n{table(lines)}\non {losses['loss_before'].n} rows")


def _row(title: str, numbers: "Mapping[str, Number]") -> tuple[object, ...]:
    names = "relative_norm", "retained", "predicted_retained", "noise", "predicted_noise", "unchanged", "unmerge_damage"
    cells = [f"{numbers[name].value:.3g}" if name in numbers else "" for name in names]
    return (title, *cells)


def gate(checked: "MergeCheck", adapter: Path) -> None:
    """Raise CheckError if the whole is outside the limits."""
    if checked.ok:
        return
    kept, noise = checked.numbers["retained"].value, checked.numbers["noise"].value
    if kept != kept and not any(m.overflowed for m in checked.modules):
        raise CheckError("the adapter changes no weight", where=str(adapter))
    wider = [name for name, number in checked.elsewhere.items() if number.value <= checked.most_noise]
    others = f"merge into {wider[0]} (predicted noise {checked.elsewhere[wider[0]].value:.3g}), or " if wider else ""
    raise CheckError(
        f"merged into {checked.dtype}, {kept:.1%} of this adapter's update is left, with noise of {noise:.1%} of it",
        why="the update is small beside the spacing of the numbers that the weights are stored in",
        fix=f"{others}keep the adapter beside the base model",
        where=str(adapter),
    )
