"""Rows for a language model: conversations, prompts with completions, and documents, each to a Draft."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from .chat import ChatTemplate
from .dataset import Examples
from .fit import Draft, cut, split
from .formats import Chat, Pair, Text
from .plain import plain_format, render_pair
from .rows import BadRow, RowError
from .tokens import START, Codec, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 512  # rows rendered and tokenised in one call

R = TypeVar("R")


def draft_chats(records: Sequence[tuple[Chat | Pair, str]], tokenizer: "PreTrainedTokenizerBase") -> Draft:
    """Render conversations by the tokenizer's template; trained are the answers with their end-of-turn tokens."""
    template = ChatTemplate(tokenizer)

    def render(chunk: list[Chat | Pair]) -> list[Rendered | RowError]:
        return template.render([record.chat() if isinstance(record, Pair) else record for record in chunk])

    draft = _draft(records, render, template.codec)
    if "strftime_now" in template.source and "date_string" not in template.source:
        draft.notices.append("the chat template writes today's date: the same rows are other tokens tomorrow")
    return replace(draft, template=template.fingerprint)


def draft_pairs(
    records: Sequence[tuple[Pair, str]], tokenizer: "PreTrainedTokenizerBase", prompt_format: str | None
) -> Draft:
    """Write prompts and completions as plain text; trained are the completion and the end token."""
    codec = Codec(tokenizer)
    format = plain_format([pair for pair, _ in records], prompt_format)

    def render(chunk: list[Pair]) -> list[Rendered | RowError]:
        return [_rendered_or_error(pair, format, codec) for pair in chunk]

    return replace(_draft(records, render, codec, end=codec.eos_id), prompt_format=format)


def draft_documents(records: Sequence[tuple[Text, str]], tokenizer: "PreTrainedTokenizerBase") -> Draft:
    """Tokenise documents; every token and the end token are trained.

    A document is taken as it is written: control tokens in it are control tokens, as in text rendered beforehand.
    """
    codec = Codec(tokenizer)
    examples, spelled = Examples(), 0
    for chunk in _chunks(records):
        texts = [record.text for record, _ in chunk]
        for text, ids, (_, where) in zip(texts, codec.encode(texts), chunk, strict=True):
            spelled += bool(codec.control_pattern.search(text))
            if codec.bos_id is not None and ids[:1] != [codec.bos_id]:
                ids = [codec.bos_id, *ids]
            if codec.eos_id is not None and ids[-1:] != [codec.eos_id]:
                ids = [*ids, codec.eos_id]
            examples.add(ids, [True] * len(ids), where)
    notices = [f"{spelled} documents spell control tokens, which are read as such"] if spelled else []
    return Draft(examples, partial(split, examples), end_tokens=codec.special_ids, bos_id=codec.bos_id, notices=notices)


def _draft(
    records: Sequence[tuple[R, str]],
    render: Callable[[list[R]], list[Rendered | RowError]],
    codec: Codec,
    end: int | None = None,
) -> Draft:
    """Render and tokenise rows chunk by chunk; `end` is put behind each row and trained."""
    examples, bad, control, apart = Examples(), [], 0, 0
    for chunk in _chunks(records):
        good: list[tuple[Rendered, str]] = []
        for rendered, (_, where) in zip(render([record for record, _ in chunk]), chunk, strict=True):
            if isinstance(rendered, RowError):
                bad.append(BadRow(where, str(rendered)))
            else:
                good.append((rendered, where))
        control += sum(START in rendered.text for rendered, _ in good)
        for encoded, (_, where) in zip(codec.encode_rows([row for row, _ in good]), good, strict=True):
            apart += not encoded.whole
            ending = [] if end is None else [end]
            examples.add([*encoded.ids, *ending], [*encoded.trained, *(True for _ in ending)], where)
    share = f"in {apart} rows prompt and answer share a token: tokenised apart, as at generation"
    notices = [share] if apart else []
    fit = partial(cut, examples)
    return Draft(examples, fit, bad, control, codec.special_ids, bos_id=codec.bos_id, notices=notices)


def _rendered_or_error(pair: Pair, format: str, codec: Codec) -> Rendered | RowError:
    try:
        return render_pair(pair, format, codec)
    except RowError as error:
        return error


def _chunks(records: Sequence[R]) -> Iterator[Sequence[R]]:
    return (records[begin : begin + CHUNK] for begin in range(0, len(records), CHUNK))
