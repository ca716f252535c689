"""The longest row allowed, and what happens to longer ones: chats are cut, documents split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..core.errors import UsageError
from .dataset import IGNORED, Example, Examples, percentile
from .rows import BadRow

LONGEST = 1024  # tokens, where max_length is not given
STEP = 64  # max_length is rounded up to a multiple: rows just above the 99th percentile stay whole
NOT_A_LIMIT = 10**6  # tokenizers without a limit say 10**30


@dataclass(frozen=True)
class Fitted:
    """Rows no longer than the limit, and what it took."""

    examples: Examples
    truncated: int = 0
    split: int = 0
    dropped: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class Draft:
    """Rows tokenised in full length, and how they are brought under a limit."""

    examples: Examples
    fit: Callable[[int], Fitted]
    bad: list[BadRow] = field(default_factory=list)
    control_rows: int = 0
    end_tokens: frozenset[int] = frozenset()
    template: str | None = None
    prompt_format: str | None = None
    bos_id: int | None = None
    labels: list[str] | None = None
    notices: list[str] = field(default_factory=list)


def choose_max_length(lengths: Sequence[int], given: int | None, model_limit: int | None, tokenizer_limit: int) -> int:
    """Give the longest row allowed: the one given, else the 99th percentile of the data, at most 1024.

    The percentile is rounded up to a multiple of 64, but not beyond the longest row. The model's limit holds for both;
    asking for more is a UsageError.
    """
    limit = model_limit or (tokenizer_limit if tokenizer_limit < NOT_A_LIMIT else None)
    if given is not None:
        if given < 2:
            raise UsageError(
                f"train.max_length: {given} is too short", fix="at least 2 tokens: one read, one predicted"
            )
        if limit is not None and given > limit:
            fix = f"train.max_length: {limit} or less"
            raise UsageError(f"train.max_length: {given} is longer than the model's {limit} positions", fix=fix)
        return given
    rounded = -(-percentile(sorted(lengths), 0.99) // STEP) * STEP
    return max(2, min(rounded, max(lengths), LONGEST, limit or LONGEST))


def cut(examples: Examples, limit: int) -> Fitted:
    """Keep the head of rows longer than `limit`; a row left without a trained token is dropped and listed."""
    if max(examples.lengths, default=0) <= limit and min(examples.trained, default=1) > 0:
        return Fitted(examples)
    kept, truncated, dropped = Examples(), 0, []
    for row in examples:
        length = len(row.input_ids)
        truncated += length > limit
        trained = _trained(row)[:limit]
        if any(trained):
            kept.add(row.input_ids[:limit], trained, row.where)
        else:
            late = f"its answer begins behind max_length {limit} (the row has {length} tokens)"
            dropped.append(BadRow(row.where, late if length > limit else "no token of it is trained"))
    return Fitted(kept, truncated=truncated, dropped=dropped)


def split(examples: Examples, limit: int) -> Fitted:
    """Split rows longer than `limit`; pieces overlap by one token, so each token is still predicted exactly once."""
    if max(examples.lengths, default=0) <= limit:
        return cut(examples, limit)
    pieces, count = Examples(), 0
    for row in examples:
        trained = _trained(row)
        count += len(trained) > limit
        for begin in range(0, max(1, len(trained) - 1), limit - 1):
            piece = slice(begin, begin + limit)
            pieces.add(row.input_ids[piece], trained[piece], row.where)
    return replace(cut(pieces, limit), split=count)


def _trained(row: Example) -> list[bool]:
    return [label != IGNORED for label in row.labels]
