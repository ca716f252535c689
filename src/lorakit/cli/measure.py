"""How good a model is on rows: mean loss, accuracy, and how many answers are exactly right."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data import Dataset, Rows
    from ..data.messages import Message
    from .opened import Opened


def losses(opened: "Opened", dataset: "Dataset", batch_size: int = 8) -> dict[str, float]:
    """Give the mean loss over all trained tokens (or rows, with the accuracy), as an evaluation in training does."""
    import torch

    from ..train.task import Classification, LanguageModelling

    model, pad = opened.model, opened.tokenizer.pad_token_id or 0
    if dataset.labels is not None:
        task: Any = Classification(len(dataset.labels), pad)
    else:
        task = LanguageModelling(model.config.get_text_config().vocab_size, pad, packed=False)
    order = sorted(range(len(dataset)), key=dataset.lengths.__getitem__)  # rows of one length need no padding
    total, right, weight = 0.0, 0, 0
    with torch.no_grad():
        for first in range(0, len(order), batch_size):
            batch = [dataset.examples[i] for i in order[first : first + batch_size]]
            loss, correct = task.loss(model, batch)
            total, right = total + float(loss), right + correct
            weight += sum(task.weight(row) for row in batch)
    found = task.measures(total / weight, right / weight)
    if dataset.labels is None:
        found["perplexity"] = math.exp(min(found["eval_loss"], 700.0))
    return found


def questions(rows: "Rows", format: str | None) -> list[tuple["str | list[Message]", str]]:
    """Give (prompt, right answer) of the rows that end with an answer; documents and labels have none."""
    from ..data.formats import Chat, Pair, find_format, parse_rows, rename_columns

    table, format = rename_columns(rows, format)
    records, _ = parse_rows(table, find_format(table, format))
    found: list[tuple[str | list[Message], str]] = []
    for record, _ in records:
        if isinstance(record, Chat) and record.messages[-1]["role"] == "assistant":
            found.append((record.messages[:-1], str(record.messages[-1]["content"])))
        elif isinstance(record, Pair):
            turns = [{"role": "system", "content": record.system}] if record.system else []
            found.append(([*turns, {"role": "user", "content": record.prompt}], record.completion))
    return found


def answers(opened: "Opened", prompts: Sequence["str | list[Message]"], max_tokens: int) -> list[str]:
    """Answer prompts greedily."""
    from ..models import generate

    return generate(opened.model, opened.tokenizer, [_written(opened, p) for p in prompts], max_tokens=max_tokens)


def exact(texts: Sequence[str], wanted: Sequence[str]) -> int:
    """Count the answers that are the right one, white space at the ends aside."""
    return sum(text.strip() == right.strip() for text, right in zip(texts, wanted, strict=True))


def _written(opened: "Opened", prompt: "str | list[Message]") -> Any:
    """Write messages as plain text for a model without a chat template."""
    if isinstance(prompt, str) or opened.tokenizer.chat_template is not None:
        return prompt
    system = next((m["content"] for m in prompt if m["role"] == "system"), None)
    return opened.prompt(prompt[-1]["content"], system)
