"""`lorakit eval`: loss, accuracy and exact answers of an adapter on data, beside those of its base model."""

from typing import Any

import typer

from ..core.errors import CheckError, DataError
from .generate import BASE, DTYPE, MODEL
from .output import json_result, notices, result, table


def evaluate(
    adapter: str = MODEL,
    data: str = typer.Option(..., "--data", "-d", help="Data file, or a directory (its test or validation rows)."),
    format: str = typer.Option(None, "--format", help="Form of the rows; found by looking when absent."),
    exact_match: int = typer.Option(
        0, "--exact-match", min=0, help="Also answer the first N rows and count right ones."
    ),
    max_tokens: int = typer.Option(128, "--max-tokens", min=1, help="Longest answer for --exact-match."),
    batch_size: int = typer.Option(8, "--batch-size", min=1, help="Rows at once."),
    compare: bool = typer.Option(True, "--compare/--no-compare", help="Also measure the base model without adapter."),
    max_loss: float = typer.Option(None, "--max-loss", help="Exit with 8 if the loss is higher."),
    min_accuracy: float = typer.Option(None, "--min-accuracy", help="Exit with 8 if accuracy or exact match is lower."),
    base: str = BASE,
    dtype: str = DTYPE,
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure an adapter on data.

    Loss, perplexity or accuracy, and with --exact-match how many answers are right, beside those of the base model.
    """
    from ..core.attach import disabled
    from ..data import read, splits
    from .opened import open_model

    opened = open_model(adapter, base=base, dtype=dtype, classify=True)
    split = next(name for name in ("test", "valid", "train") if name in splits(data))
    rows = read(data, split)
    dataset = _encode(opened, rows, format)
    wanted = questions_of(rows, format, exact_match)
    settings = {"dataset": dataset, "wanted": wanted, "max_tokens": max_tokens, "batch_size": batch_size}
    found: dict[str, Any] = {"rows": len(dataset), "split": split, **measure(opened, **settings)}
    if compare and opened.adapter is not None and dataset.labels is None:  # a classifier's base has no trained head
        with disabled(opened.model):
            found["base"] = measure(opened, **settings)
    if json:
        json_result(found)
    else:
        show(found)
        notices(dataset.stats.notices)
    gate(found, max_loss, min_accuracy)


def measure(opened: Any, dataset: Any, wanted: list[Any], max_tokens: int, batch_size: int) -> dict[str, Any]:
    """Give every figure of the model as it is."""
    from .measure import answers, exact, losses

    found: dict[str, Any] = losses(opened, dataset, batch_size)
    if wanted:
        texts = answers(opened, [prompt for prompt, _ in wanted], max_tokens)
        found["exact_match"] = exact(texts, [right for _, right in wanted]) / len(wanted)
    return found


def questions_of(rows: Any, format: str | None, count: int) -> list[Any]:
    """Give the first questions of the rows; DataError if they were asked for and there are none."""
    if not count:
        return []
    from .measure import questions

    found = questions(rows, format)[:count]
    if not found:
        raise DataError("--exact-match: these rows hold no answers", fix="leave --exact-match out")
    return found


def show(found: dict[str, Any]) -> None:
    """Print the figures, the base model's beside them."""
    base = found.get("base")
    result(f"{found['rows']} rows ({found['split']})")
    rows: list[tuple[object, ...]] = [("", "adapter", "base")] if base else []
    for key in ("eval_loss", "perplexity", "eval_accuracy", "exact_match"):
        if key in found:
            rows.append((key.replace("_", " "), found[key], *([base[key]] if base else [])))
    result(table(rows))


def gate(found: dict[str, Any], max_loss: float | None, min_accuracy: float | None) -> None:
    """Raise CheckError if a limit that was asked for does not hold."""
    if max_loss is not None and not found["eval_loss"] <= max_loss:
        raise CheckError(f"the loss is {found['eval_loss']:.4f}, above {max_loss}")
    accuracy = found.get("exact_match", found.get("eval_accuracy"))
    if min_accuracy is not None and (accuracy is None or accuracy < min_accuracy):
        raise CheckError(f"the accuracy is {accuracy}, below {min_accuracy}")


def _encode(opened: Any, rows: Any, format: str | None) -> Any:
    from ..data import encode

    return encode(
        rows,
        opened.tokenizer,
        task=opened.side.get("task"),
        format=format,
        labels=opened.side.get("labels"),
        max_length=opened.side.get("max_length"),
    )
