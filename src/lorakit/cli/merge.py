"""`lorakit merge`: a model with the adapter folded in, and proof that it is the same model."""

from pathlib import Path
from typing import Any

import typer

from ..core.errors import CheckError, UsageError
from .output import json_result, note, result, table

TOLERANCE = 1e-3  # of the largest logit, for a merge in float32; measured: 1e-5


def merge(
    adapter: str = typer.Argument(..., metavar="ADAPTER", help="Adapter or run directory.", show_default=False),
    output: Path = typer.Option(..., "--output", "-o", help="Directory to write."),
    dtype: str = typer.Option(None, "--dtype", help="float32 or bfloat16; as the base model's files when absent."),
    base: str = typer.Option(None, "--base", "--model", help="Base model, if not the one the adapter names."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the directory if it exists."),
    json: bool = typer.Option(False, "--json", help="Print the check as JSON."),
) -> None:
    """Fold an adapter into its base model.

    Float32 arithmetic, one rounding at the end, and a parity check on three prompts before anything is written.
    """
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", fix="choose another directory, or give --overwrite")
    if dtype not in (None, "float32", "bfloat16"):
        raise UsageError(f"unknown dtype {dtype!r}", fix="float32 or bfloat16")
    from .opened import open_model, require_adapter
    from .parity import fold, stored_dtype

    found = require_adapter(adapter)
    if output.resolve() == found.resolve() or output.resolve() in found.resolve().parents:
        raise UsageError(f"{output} holds the adapter itself", fix="choose another directory")
    opened = open_model(str(found), base=base, dtype="float32", classify=True, plain=True)
    target = dtype or stored_dtype(opened.path)
    check = fold(opened, target)
    if check["layers_changed"] == 0:
        raise CheckError(
            "the merged model equals the base model", why="the adapter changes no weight", where=str(found)
        )
    if target == "float32" and check["max_logit_difference"] > TOLERANCE * check["max_logit"]:
        raise CheckError(
            "the merged model does not answer like base and adapter",
            why=f"its logits differ by up to {check['max_logit_difference']:.3g}; nothing was written",
            where=str(found),
        )
    write(opened, output, target)
    if json:
        json_result({"output": str(output), "dtype": target, **check})
        return
    result(f"{output}  {target}, {size(output) / 1e6:.0f} MB")
    result(table([(f"  {key.replace('_', ' ')}", value) for key, value in check.items()]))
    if check["relative_delta_error"] > 0.5:
        note(f"{target} keeps little of this adapter's change; --dtype float32 keeps all of it")


def write(opened: Any, output: Path, dtype: str) -> None:
    """Write the merged model with its tokenizer as a Hugging Face directory, whole or not at all."""
    import torch

    from ..core.attach import detach
    from ..core.files import atomic_directory
    from ..models.console import quiet_transformers

    model: Any = detach(opened.model)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind)  # buffers stay as they are: rotary frequencies need float32
    model.config.dtype = kind
    _untie(model)
    with atomic_directory(output) as work, quiet_transformers():
        model.save_pretrained(work)
        opened.tokenizer.save_pretrained(work)


def _untie(model: Any) -> None:
    """Say in the configuration that embedding and head are two weights, where merging only one of them made them so.

    Whoever trusts the flag would otherwise load the one in the other's place.
    """
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    if outer is not None and model.config.tie_word_embeddings and inner.weight is not outer.weight:
        model.config.tie_word_embeddings = False


def size(directory: Path) -> int:
    """Give the bytes of the files in a directory."""
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
