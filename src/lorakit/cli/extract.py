"""`lorakit extract`: the best LoRA of a fully fine-tuned model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..core.errors import UsageError
from .output import json_result, result, table

if TYPE_CHECKING:
    from ..analysis.extract import Extraction

SHOWN = 12


def extract(
    base: str = typer.Option(..., "--base", help="The model that was tuned."),
    tuned: str = typer.Option(..., "--tuned", help="The fully fine-tuned model."),
    output: Path = typer.Option(..., "--output", "-o", help="Directory to write."),
    rank: int = typer.Option(None, "--rank", "-r", help="Rank of every module."),
    energy: float = typer.Option(None, "--energy", help="Or: per module the least rank with this share of the energy."),
    target: list[str] = typer.Option([], "--target-modules", help="Layers to extract; all linear ones when absent."),
    full: bool = typer.Option(False, "--full", help="Keep in full what changed and is no targeted matrix."),
    drop_rest: bool = typer.Option(False, "--drop-rest", help="Leave it out."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the directory if it exists."),
    every: bool = typer.Option(False, "--all", help="Show every module, not only the ones with the largest error."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Make a LoRA of what full fine-tuning changed.

    The best one of its rank, module by module, with its exact error. Norms, biases and embeddings that changed are listed:
    --full keeps them whole beside the LoRA, --drop-rest leaves them out; without either nothing is written.
    """
    from ..analysis.extract import Wanted, as_lora
    from ..analysis.extract import extract as extracted
    from ..analysis.lora_files import write_lora
    from ..core.files import atomic_directory
    from ..models.skeleton import skeleton
    from .machine import set_threads
    from .weights import open_base

    wanted = Wanted(rank, energy, list(target) or "all-linear")
    if full and drop_rest:
        raise UsageError("--full and --drop-rest are both given", fix="give one of them")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", fix="choose another directory, or give --overwrite")
    set_threads()
    before, after = open_base(base), open_base(tuned)
    if output.resolve() in (before.directory.resolve(), after.directory.resolve()):
        raise UsageError(f"{output} holds a model", fix="choose another directory")
    labels = class_names(after.config)
    model = skeleton(
        after.directory, task="causal" if labels is None else "classification", dtype="float32", labels=labels
    )
    found = extracted(before, after, model, wanted, full=full)
    _require_said(found, full=full, drop_rest=drop_rest)
    with atomic_directory(output) as work:
        write_lora(work, as_lora(found, model, before, base, labels), tokenizer_of=after.directory)
    if json:
        json_result({**found.json(), "written": str(output)})
    else:
        show(found, output, every=every, full=full)


def class_names(config: dict) -> list[str] | None:
    """Give the classes of a sequence classifier in the order of its logits, None for another model."""
    if not any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return None
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return [str(names[key]) for key in sorted(names, key=int)]


def _require_said(found: "Extraction", *, full: bool, drop_rest: bool) -> None:
    """Raise UsageError for changes that nobody said what to do with, and for a LoRA without layers."""
    if found.rest and not (full or drop_rest):
        shown = ", ".join(f"{r.path}.{r.name} (by {r.relative:.2g})" for r in found.rest[:4])
        more = f" and {len(found.rest) - 4} more" if len(found.rest) > 4 else ""
        raise UsageError(
            f"{len(found.rest)} tensors changed that a LoRA of the targeted layers does not hold: {shown}{more}",
            fix="--full keeps their modules whole (modules_to_save), --drop-rest leaves them out",
        )
    if not found.modules:
        raise UsageError("no targeted matrix changed", why="there is nothing to make a LoRA of")


def show(found: "Extraction", output: Path, *, every: bool, full: bool) -> None:
    """Print the modules, the largest error first, and what is not in them."""
    worst = sorted(found.modules, key=lambda own: -own.numbers["error"].value)
    shown = worst if every else worst[:SHOWN]
    names = ("relative_norm", "error", "spectral_error", "effective_rank", "gavish_donoho_rank")
    titles = ("ΔW/W", "error", "spectral error", "eff. rank", "Gavish-Donoho")
    lines: list[tuple[object, ...]] = [("module", "rank", *titles)]
    lines += [(own.path, len(own.A), *(f"{own.numbers[name].value:.3g}" for name in names)) for own in shown]
    if len(worst) > len(shown):
        lines.append((f"{len(worst) - len(shown)} more, less error", *[""] * 6))
    result(table(lines))
    result(
        f"\nerror of the whole {found.numbers['error'].value:.4g} of the change (Frobenius), the least of these ranks"
    )
    ranks = sorted(own.numbers["gavish_donoho_rank"].value for own in found.modules)
    result(f"Gavish-Donoho ranks {ranks[0]:g} to {ranks[-1]:g}: above the bulk of each change, if the bulk is noise")
    if found.rest:
        what = "kept in full" if full else "left out"
        result(f"{what}: {_listed([f'{r.path}.{r.name}' for r in found.rest])}")
    result(f"{found.same} tensors did not change\nloss: not measured (lorakit eval)\n\n{output}: written")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
