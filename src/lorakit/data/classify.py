"""Rows for a classifier: one text or a pair, tokenised with the model's own special tokens, and a class."""

import difflib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError
from .dataset import Examples
from .fit import Draft, Fitted
from .formats import Labelled
from .rows import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024
SHOWN = 10

Records = Sequence[tuple[Labelled, str]]


def draft_labelled(records: Records, tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str] | None) -> Draft:
    """Tokenise labelled texts; classes are `labels` in their order, or else those of the data. Raises DataError."""
    names = list(labels) if labels else class_names([record.label for record, _ in records])
    index = {name: i for i, name in enumerate(names)}
    good, bad = [], []
    for record, where in records:
        name = str(record.label)
        if name not in index and name.isdecimal() and int(name) < len(names):
            name = names[int(name)]  # data with class numbers, a model with class names
        if name in index:
            good.append((record, where, index[name]))
        else:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names[:SHOWN])}"
            bad.append(BadRow(where, f"unknown class {name!r}; {hint}"))
    examples = _encode(good, tokenizer)
    return Draft(examples, partial(_shorten, examples, good, tokenizer), bad, labels=names)


def class_names(labels: Sequence[str | int]) -> list[str]:
    """Name the classes of the data: numbers in their order, names alphabetically. Raises DataError for fewer than 2."""
    names = {str(label) for label in labels}
    if len(names) < 2:
        one = f"all rows have the class {next(iter(names))!r}" if names else "no row has a class"
        raise DataError(f"a classifier needs at least 2 classes, and {one}")
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def _encode(rows: Sequence[tuple[Labelled, str, int]], tokenizer: "PreTrainedTokenizerBase") -> Examples:
    examples = Examples()
    for begin in range(0, len(rows), CHUNK):
        chunk = rows[begin : begin + CHUNK]
        tokens = _tokenise([record for record, _, _ in chunk], tokenizer)
        types = tokens.get("token_type_ids", [None] * len(chunk))
        for ids, its_types, (_, where, label) in zip(tokens["input_ids"], types, chunk, strict=True):
            examples.add_labelled(ids, its_types, label, where)
    return examples


def _tokenise(records: Sequence[Labelled], tokenizer: "PreTrainedTokenizerBase", limit: int | None = None) -> Any:
    """Tokenise texts with [CLS], [SEP] and the like around them, and nothing in a text taken for one of these.

    A tokenizer without a separator gets a pair as two lines of one text.
    """
    texts, pairs = [record.text for record in records], [record.pair or "" for record in records]
    paired = records[0].pair is not None
    if paired and tokenizer.sep_token is None:
        texts, paired = [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)], False
    return tokenizer(
        texts,
        text_pair=pairs if paired else None,
        return_attention_mask=False,
        return_token_type_ids=paired and "token_type_ids" in tokenizer.model_input_names,
        split_special_tokens=True,
        truncation=limit is not None,
        max_length=limit,
        verbose=False,
    )


def _shorten(
    examples: Examples, rows: Sequence[tuple[Labelled, str, int]], tokenizer: "PreTrainedTokenizerBase", limit: int
) -> Fitted:
    lengths = examples.lengths
    if max(lengths, default=0) <= limit:
        return Fitted(examples)
    fitted, truncated = Examples(), 0
    for example, length, (record, where, label) in zip(examples, lengths, rows, strict=True):
        ids, types = example.input_ids, example.token_type_ids
        if length > limit:
            tokens = _tokenise([record], tokenizer, limit)
            ids, types = tokens["input_ids"][0], tokens.get("token_type_ids", [None])[0]
            truncated += 1
        fitted.add_labelled(ids, types, label, where)
    return Fitted(fitted, truncated=truncated)
