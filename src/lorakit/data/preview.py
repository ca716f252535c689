"""Rows shown with what is trained and what is not: the mask as a person can check it."""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from .dataset import IGNORED, Dataset, Example

if TYPE_CHECKING:
    from rich.text import Text as RichText
    from transformers import PreTrainedTokenizerBase

Segment = tuple[str, bool]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line end: they could steer a terminal
_BROKEN = "\ufffd"


def preview(dataset: Dataset, tokenizer: "PreTrainedTokenizerBase", n: int = 3) -> list[list[Segment]]:
    """Give the first `n` rows as runs of (text, trained)."""
    return [segments(example, tokenizer, dataset.labels) for example in dataset.examples[:n]]


def segments(
    example: Example, tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str] | None = None
) -> list[Segment]:
    """Give a row as runs of (text, trained); a class is one trained run at the end.

    A character whose bytes are split between two runs is shown in the later one.
    """
    if example.label is not None:
        name = labels[example.label] if labels else str(example.label)
        return [(_decode(example.input_ids, tokenizer), False), (name, True)]
    runs: list[Segment] = []
    shown, end = "", 0
    for trained, labels_of_run in groupby(example.labels, key=lambda label: label != IGNORED):
        end += sum(1 for _ in labels_of_run)
        text = _decode(example.input_ids[:end], tokenizer)
        if end < len(example.input_ids):
            text = text.rstrip(_BROKEN)
        runs.append((text[len(shown) :], trained))
        shown = text
    return [run for run in runs if run[0]]


def to_plain(runs: Sequence[Segment]) -> str:
    """Give a row for a terminal without colour: [[ ]] around what is trained."""
    return "".join(f"[[{_safe(text)}]]" if trained else _safe(text) for text, trained in runs)


def to_rich(runs: Sequence[Segment]) -> "RichText":
    """Give a row for rich: green is trained, grey is not."""
    from rich.text import Text

    return Text.assemble(*((_safe(text), "green" if trained else "grey50") for text, trained in runs))


def _decode(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)  # ty: ignore


def _safe(text: str) -> str:
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
