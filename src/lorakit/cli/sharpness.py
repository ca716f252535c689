"""`lorakit sharpness`: how sharply the loss bends in an adapter's parameters, and whether the rate is too high for it (expert)."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import FileError, UsageError
from .generate import BASE
from .output import json_result, note, notices, result, table

if TYPE_CHECKING:
    from ..analysis.sharpness import Adam, Sharpness


def sharpness(
    adapter: str = typer.Argument(..., metavar="ADAPTER", help="Adapter or run directory.", show_default=False),
    data: str = typer.Option(..., "--data", "-d", help="Rows of the loss: a file or a directory."),
    checkpoint: Path = typer.Option(
        None, "--checkpoint", help="Checkpoint (RUN/checkpoints/step-...) with the optimizer's state."
    ),
    lr: float = typer.Option(None, "--lr", min=0.0, help="Learning rate, if not the one in force at the checkpoint."),
    steps: int = typer.Option(20, "--steps", min=2, help="Lanczos steps, two gradients of all rows each."),
    rows: int = typer.Option(16, "--rows", min=1, help="Rows, evenly spaced."),
    seed: int = typer.Option(0, "--seed", help="Start of the random numbers."),
    format: str = typer.Option(None, "--format", help="Form of the rows; found by looking when absent."),
    base: str = BASE,
    dtype: str = typer.Option("float32", "--dtype", help="float32; bfloat16 makes differences of gradients noisy."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Give the extreme eigenvalues of the Hessian in an adapter's parameters (expert).

    With --checkpoint it is that of the checkpoint, preconditioned by its Adam state, and lr times the largest eigenvalue is
    compared with what Adam is stable at. Without one there is no verdict: the raw sharpness depends on how the change is
    written as B A.
    """
    from ..analysis.sharpness import sharpness as measure
    from ..core.attach import trainable
    from .held_out import held_out
    from .opened import ADAPTER, open_model, require_adapter

    opened = open_model(str(require_adapter(adapter)), base=base, dtype=dtype, classify=True)
    chosen, dataset = held_out(opened, data, format, rows)
    notices(dataset.stats.notices)
    trainable(opened.model, ADAPTER)
    parameters = [p for p in opened.model.parameters() if p.requires_grad]
    adam = None if checkpoint is None else state_of(opened.model, checkpoint, parameters)
    if adam is not None and lr is not None:
        adam = replace(adam, rates=[lr * rate / max(adam.rates) for rate in adam.rates])
    if adam is None:
        note(
            "no optimizer's state: --checkpoint RUN/checkpoints/step-... compares the learning rate with the curvature"
        )
    found = measure(parameters, gradient_of(chosen, parameters), steps=steps, adam=adam, seed=seed)
    if json:
        json_result(as_dict(found))
    else:
        show(found)


def gradient_of(rows: Any, parameters: list[Any]) -> Any:
    """Give the function that computes the gradient of the mean loss of the rows."""
    import torch

    weight = float(rows.weights().sum())

    def gradient() -> list[torch.Tensor]:
        sums = [torch.zeros_like(p) for p in parameters]
        with torch.enable_grad():
            for batch in rows.batches():
                found = torch.autograd.grad(rows.predict(batch).losses().sum() / weight, parameters, allow_unused=True)
                for total, own in zip(sums, found, strict=True):
                    if own is not None:
                        total += own
        return sums

    return gradient


def state_of(model: Any, checkpoint: Path, parameters: list[Any]) -> "Adam":
    """Put a checkpoint's adapter on the model, and give what its optimizer holds."""
    from ..analysis.sharpness import Adam
    from ..optim import OPTIMIZERS, parameter_groups
    from ..train.adapter_state import restore_adapter
    from ..train.checkpoint import load, restore_optimizer
    from ..train.config_file import load as load_config
    from .opened import ADAPTER

    if not (checkpoint / "manifest.json").is_file():
        raise FileError(f"{checkpoint} is no checkpoint", fix="give RUN/checkpoints/step-000100")
    tensors, state = load(checkpoint)
    config, _ = load_config(checkpoint.parent.parent / "config.yaml")
    restore_adapter(model, ADAPTER, tensors["adapter"])
    optimizer = OPTIMIZERS[config.optim.name](parameter_groups(model, ADAPTER, config.optim), config.optim)
    restore_optimizer(optimizer, tensors["optimizer"], state["optimizer"])
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    squares, rates = [], []
    for p in parameters:
        own, group = optimizer.state[p], groups[id(p)]
        if "exp_avg_sq" not in own or own["exp_avg_sq"].shape != p.shape:
            raise UsageError(
                f"the optimizer {config.optim.name} keeps no running mean of each squared gradient",
                why="only Adam's kind has the threshold that the rate is compared with",
                fix="leave --checkpoint out for the raw sharpness",
            )
        squares.append(own["exp_avg_sq"].to(p) / (1 - group["betas"][1] ** float(own["step"])))
        rates.append(float(group["lr"]))
    return Adam(squares, rates, config.optim.betas[0], config.optim.eps)


def as_dict(found: "Sharpness") -> dict[str, Any]:
    """Give everything for machines."""
    ratio, judgement = found.ratio, found.judgement()
    return {
        "preconditioned": found.adam is not None,
        "largest": found.largest.json(),
        "ratio": None if ratio is None else ratio.json(),
        "values": found.values.tolist(),
        "residuals": found.residuals.tolist(),
        "negative": [number.json() for number in found.negative],
        "steps": found.steps,
        "judgements": [] if judgement is None else [judgement.json()],
    }


def show(found: "Sharpness") -> None:
    """Print it for people: the largest eigenvalues and the smallest, each with the error it may have."""
    from .strength import tell

    name = "eigenvalue of H" if found.adam is None else "eigenvalue of lr P^-1 H"
    order = sorted(range(len(found.values)), key=lambda i: -float(found.values[i]))
    shown = order if len(order) <= 8 else [*order[:5], *order[-3:]]
    result(
        table([(name, "±"), *((f"{float(found.values[i]):+.5g}", f"{float(found.residuals[i]):.1g}") for i in shown)])
    )
    result(
        f"{found.steps} steps, {len(found.negative)} values certainly below zero (a saddle is usual; flat is not better)"
    )
    judgement = found.judgement()
    if judgement is not None:
        result("")
        tell(judgement)
