"""Rows to a Dataset: find the format, tokenise, bring under the length limit, count and check."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError, UsageError
from .classify import draft_labelled
from .dataset import Dataset, Facts, Stats, percentile
from .fit import Draft, Fitted, choose_max_length
from .formats import Chat, Format, Labelled, Pair, Record, Text, find_format, parse_rows, rename_columns, unused_columns
from .language import draft_chats, draft_documents, draft_pairs
from .rows import Row, Rows, places, refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS: dict[str, tuple[type[Any], ...]] = {
    "sft": (Chat, Pair),
    "completion": (Pair, Text),
    "classification": (Labelled,),
}


def find_task(rows: Sequence[Row], format: str | None = None) -> str:
    """Find what the rows are for by looking at them: sft, completion or classification. Raises DataError."""
    table, format = rename_columns(rows, format)
    return find_format(table, format).task


def encode(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: str | None = None,
    format: str | None = None,
    max_length: int | None = None,
    labels: Sequence[str] | None = None,
    skip_bad_rows: bool = False,
    model_limit: int | None = None,
) -> Dataset:
    """Tokenise rows for a task (found by looking when None) and check them.

    format: a name, or a map of columns such as `prompt=question,completion=answer`; found by looking when None
    max_length: tokens kept of a row; when None the 99th percentile of the data, at most 1024 and `model_limit`
    labels: class names of a trained classifier, whose order the data must follow

    Raises DataError if a row cannot be used, naming all such rows; `skip_bad_rows` leaves them out and lists them.
    """
    left_out, notices = (list(rows.bad), list(rows.notices)) if isinstance(rows, Rows) else ([], [])
    table, format = rename_columns(rows, format)
    if not table:
        raise DataError("0 usable rows", fix="give data with at least one row")
    fmt = find_format(table, format)
    records, bad = parse_rows(table, fmt)
    task = _check_task(task or fmt.task, fmt, records)
    total = len(table) + len(left_out)
    if bad and not (skip_bad_rows and records):
        raise refuse(bad, total)
    draft = _draft(records, fmt, task, tokenizer, labels, notices)
    bad += draft.bad
    if draft.bad and not (skip_bad_rows and len(draft.examples)):
        raise refuse(draft.bad, total)
    limit = choose_max_length(draft.examples.lengths, max_length, model_limit, tokenizer.model_max_length)
    fitted = draft.fit(limit)
    if not len(fitted.examples):
        raise DataError(
            f"0 usable rows: nothing to train on in the first {limit} tokens of any row",
            why=f"{fitted.dropped[0].where}  {fitted.dropped[0].reason}",
            fix="raise train.max_length, or shorten the prompts",
        )
    facts = _facts(draft, fitted, tokenizer)
    notices += [*_format_notices(table, fmt), *draft.notices, *_length_notices(fitted, limit)]
    if facts.ends_with_end_token is False:
        notices.append("some rows end without an end token: the model will not learn to stop there")
    stats = _stats(draft, fitted, total, limit)
    stats.bad_rows = [*left_out, *bad, *fitted.dropped]
    stats.dropped = len(stats.bad_rows)
    stats.notices = notices
    fingerprint = fitted.examples.fingerprint()
    return Dataset(fitted.examples, stats, facts, task, fmt.words, draft.labels, draft.prompt_format, fingerprint)


def _check_task(task: str, fmt: Format, records: Sequence[tuple[Record, str]]) -> str:
    if task not in TASKS:
        raise UsageError(f"train.task: unknown task {task!r}", fix=f"one of {', '.join(TASKS)}")
    for record, where in records:
        if not isinstance(record, TASKS[task]):
            fix = f"train.task: {fmt.task}, or another data.format"
            raise UsageError(f"train.task: {task} cannot use rows of the form {fmt.words}", fix=fix, where=where)
    return task


def _draft(
    records: Sequence[tuple[Any, str]],
    fmt: Format,
    task: str,
    tokenizer: "PreTrainedTokenizerBase",
    labels: Sequence[str] | None,
    notices: list[str],
) -> Draft:
    if task == "classification":
        return draft_labelled(records, tokenizer, labels)
    if all(isinstance(record, Text) for record, _ in records):
        return draft_documents(records, tokenizer)
    pairs_only = all(isinstance(record, Pair) for record, _ in records)
    if task == "completion" or (pairs_only and not tokenizer.chat_template):
        if task == "sft":
            notices.append("the tokenizer has no chat template: prompts and completions are joined as plain text")
        return draft_pairs(records, tokenizer, fmt.plain_prompt)
    return draft_chats(records, tokenizer)


def _facts(draft: Draft, fitted: Fitted, tokenizer: "PreTrainedTokenizerBase") -> Facts:
    if draft.labels is not None:
        return Facts(True, None, None, None, None, fitted.examples.largest_id())
    last = Counter(draft.examples.last_trained())
    ends = Counter({token: count for token, count in last.items() if token in draft.end_tokens})
    return Facts(
        every_row_trained=min(fitted.examples.trained) > 0,
        ends_with_end_token=ends.total() == last.total(),
        end_token=str(tokenizer.decode([ends.most_common(1)[0][0]])) if ends else None,
        template=draft.template,
        bos_token=tokenizer.bos_token if draft.bos_id is not None else None,
        largest_id=fitted.examples.largest_id(),
    )


def _stats(draft: Draft, fitted: Fitted, total: int, limit: int) -> Stats:
    lengths = sorted(draft.examples.lengths)
    kept = fitted.examples
    return Stats(
        rows=total,
        kept=len(kept),
        truncated=fitted.truncated,
        split=fitted.split,
        dropped=0,
        tokens=sum(kept.lengths),
        trained_tokens=sum(kept.trained) if draft.labels is None else 0,
        length_p50=percentile(lengths, 0.5),
        length_p90=percentile(lengths, 0.9),
        length_p99=percentile(lengths, 0.99),
        length_max=lengths[-1],
        max_length=limit,
        control_rows=draft.control_rows,
        duplicates=len(kept) - len(set(kept.digests())),
    )


def _format_notices(table: Sequence[Row], fmt: Format) -> list[str]:
    notices = [f"format guessed: {fmt.words}; data.format: {fmt.name} confirms it"] if fmt.guessed else []
    if unused := unused_columns(table, fmt):
        notices.append(f"columns not used: {', '.join(unused)}")
    return notices


def _length_notices(fitted: Fitted, limit: int) -> list[str]:
    notices = []
    if fitted.truncated:
        notices.append(f"{fitted.truncated} rows cut at max_length {limit}")
    if fitted.split:
        notices.append(f"{fitted.split} documents split at max_length {limit}, nothing lost")
    if fitted.dropped:
        notices.append(
            f"{len(fitted.dropped)} rows dropped, nothing to train on after the cut: {places(fitted.dropped)}"
        )
    return notices
