"""The forms a row can have, found by looking at the columns, and what each row means.

A format turns the columns of one row into a record: a Chat, a Pair (prompt and completion), a Text, or a Labelled text.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import DataError, UsageError
from .json_rows import kind
from .messages import Message, check_messages
from .rows import BadRow, Row, RowError


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages ({role, content, ...}), which of them are trained, and the tools of a row in JSON Schema, if any."""

    messages: list[Message]
    trained: list[bool]
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and the completion to train."""

    prompt: str
    completion: str
    system: str | None = None

    def chat(self) -> Chat:
        """Give the pair as one exchange of user and assistant."""
        messages = [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}]
        return Chat(*check_messages(messages, self.system))


@dataclass(frozen=True, slots=True)
class Text:
    """A document, trained as a whole."""

    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair of texts, and its class."""

    text: str
    pair: str | None
    label: str | int


Record = Chat | Pair | Text | Labelled


@dataclass(frozen=True)
class Format:
    """A form of rows: its name, in `words`, the task it is for, and the columns it needs and can use."""

    name: str
    words: str
    task: str
    needs: tuple[str, ...]
    parse: Callable[[dict[str, Any]], Record]
    uses: tuple[str, ...] = ()
    guessed: bool = False
    plain_prompt: str | None = None  # how a prompt is written for a model without a chat template; None: as it is


def text_of(fields: dict[str, Any], column: str, *, empty: bool = False) -> str:
    """Give a column that must be text, and not blank unless `empty`. Raises RowError."""
    value = fields.get(column)
    if not isinstance(value, str):
        raise RowError(f"no column {column!r}" if column not in fields else f"{column!r} is {kind(value)}, not text")
    if not empty and not value.strip():
        raise RowError(f"{column!r} is empty; nothing to train on in this row")
    return value


def _chat(column: str) -> Callable[[dict[str, Any]], Record]:
    def parse(fields: dict[str, Any]) -> Record:
        if column not in fields:
            raise RowError(f"no column {column!r}")
        tools = fields.get("tools") or None
        if tools is not None and not isinstance(tools, list):
            raise RowError(f"'tools' is {kind(tools)}, not a list")
        return Chat(*check_messages(fields[column], fields.get("system")), tools)

    return parse


def _pair(prompt: str, completion: str) -> Callable[[dict[str, Any]], Record]:
    def parse(fields: dict[str, Any]) -> Record:
        asked, answer = fields.get(prompt), fields.get(completion)
        if isinstance(asked, list) and isinstance(answer, list):
            messages, trained = check_messages([*asked, *answer], fields.get("system"))
            context = len(messages) - len(answer)
            return Chat(messages, [t and turn >= context for turn, t in enumerate(trained)], fields.get("tools"))
        system = text_of(fields, "system", empty=True) if fields.get("system") else None
        return Pair(text_of(fields, prompt), text_of(fields, completion), system)

    return parse


def _alpaca(fields: dict[str, Any]) -> Record:
    parts = [text_of(fields, "instruction"), text_of(fields, "input", empty=True) if fields.get("input") else ""]
    system = text_of(fields, "system", empty=True) if fields.get("system") else None
    return Pair("\n\n".join(part for part in parts if part.strip()), text_of(fields, "output"), system)


def _text(fields: dict[str, Any]) -> Record:
    return Text(text_of(fields, "text"))


def _labelled(first: str, second: str | None = None) -> Callable[[dict[str, Any]], Record]:
    def parse(fields: dict[str, Any]) -> Record:
        label = fields.get("label")
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if isinstance(label, str):
            label = label.strip()
        if not isinstance(label, str | int) or label == "":
            raise RowError(
                "no column 'label'" if label is None else f"'label' is {label!r}, not a class name or number"
            )
        if isinstance(label, int) and not isinstance(label, bool) and label < 0:
            raise RowError(f"'label' is {label}, which marks a row without a label")
        return Labelled(text_of(fields, first), text_of(fields, second) if second else None, label)

    return parse


ALPACA_PROMPT = "### Instruction:\n{prompt}\n\n### Response:\n"


def _classification(*texts: str) -> Format:
    words = f"classification ({' + '.join(texts)} + label)"
    return Format("classification", words, "classification", (*texts, "label"), _labelled(*texts))


def _guess(prompt: str, completion: str) -> Format:
    words = f"{prompt} and {completion}, taken as prompt and completion"
    parse = _pair(prompt, completion)
    return Format(f"{prompt}/{completion}", words, "sft", (prompt, completion), parse, ("system",), guessed=True)


# In the order in which they are looked for: the first one that fits a row is its format.
FORMATS = (
    Format("messages", "messages (OpenAI chat)", "sft", ("messages",), _chat("messages"), ("system", "tools")),
    Format(
        "sharegpt", "conversations (ShareGPT)", "sft", ("conversations",), _chat("conversations"), ("system", "tools")
    ),
    Format(
        "completion",
        "prompt + completion",
        "sft",
        ("prompt", "completion"),
        _pair("prompt", "completion"),
        ("system", "tools"),
    ),
    Format(
        "alpaca",
        "instruction + output (Alpaca)",
        "sft",
        ("instruction", "output"),
        _alpaca,
        ("input", "system"),
        False,
        ALPACA_PROMPT,
    ),
    _classification("sentence1", "sentence2"),
    _classification("premise", "hypothesis"),
    _classification("question1", "question2"),
    _classification("question", "sentence"),
    _classification("sentence"),
    _classification("text"),
    Format("text", "text (plain documents)", "completion", ("text",), _text),
    _guess("input", "output"),
    _guess("question", "answer"),
    _guess("query", "response"),
    _guess("prompt", "response"),
    _guess("instruction", "response"),
    _guess("mr", "ref"),
)
NAMES = {
    **{fmt.name: fmt.name for fmt in FORMATS},
    "chat": "messages",
    "openai": "messages",
    "chatml": "messages",
    "conversations": "sharegpt",
    "prompt-completion": "completion",
    "prompt_completion": "completion",
    "prompt+completion": "completion",
    "instruction": "alpaca",
    "text+label": "classification",
    "text-classification": "classification",
}
LOOKED_AT = 100  # rows whose columns decide


def find_format(rows: Sequence[Row], format: str | None = None) -> Format:
    """Find the format of rows by their columns, or look up the one named.

    `format` is a name (messages, sharegpt, completion, alpaca, text, classification, input/output, ...). Raises
    UsageError for an unknown name and DataError if no format fits.
    """
    known = [fmt for fmt in FORMATS if format is None or fmt.name == _canonical(format)]
    votes = Counter(
        fmt
        for row in rows[:LOOKED_AT]
        for fmt in [fmt for fmt in known if all(row.fields.get(column) is not None for column in fmt.needs)][:1]
    )
    if votes:
        return votes.most_common(1)[0][0]
    if format is not None:
        return known[0]
    raise _unknown(rows)


def rename_columns(rows: Iterable[Row], format: str | None) -> tuple[list[Row], str | None]:
    """Apply a format that maps columns (`prompt=question,completion=answer`); gives the rows and the format left."""
    if format is None or "=" not in format:
        return list(rows), format
    pairs = [part.split("=") for part in re.split(r"[,\s]+", format.strip())]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UsageError(f"data.format: {format!r} is no map of columns", fix="write prompt=COLUMN,completion=COLUMN")
    names = {theirs: ours for ours, theirs in pairs}
    taken = set(names.values())
    return [
        Row(
            {
                names.get(column, column): v
                for column, v in row.fields.items()
                if column in names or column not in taken
            },
            row.where,
        )
        for row in rows
    ], None


def parse_rows(rows: Iterable[Row], fmt: Format) -> tuple[list[tuple[Record, str]], list[BadRow]]:
    """Give (record, where) of the rows that hold together, and the ones that do not."""
    good, bad = [], []
    for row in rows:
        try:
            good.append((fmt.parse(row.fields), row.where))
        except RowError as error:
            bad.append(error.at(row.where))
    return good, bad


def unused_columns(rows: Sequence[Row], fmt: Format) -> list[str]:
    """Name the columns of the first rows that the format does not look at."""
    seen = dict.fromkeys(column for row in rows[:LOOKED_AT] for column in row.fields)
    return [column for column in seen if column not in (*fmt.needs, *fmt.uses)]


def _canonical(format: str) -> str:
    name = NAMES.get(format.lower())
    if name is None:
        near = difflib.get_close_matches(format.lower(), NAMES, n=1)
        hint = f"did you mean {NAMES[near[0]]!r}? " if near else ""
        formats = ", ".join(dict.fromkeys(fmt.name for fmt in FORMATS))
        raise UsageError(f"data.format: unknown format {format!r}", fix=f"{hint}there are: {formats}")
    return name


def _unknown(rows: Sequence[Row]) -> DataError:
    columns = list(dict.fromkeys(column for row in rows[:LOOKED_AT] for column in row.fields))
    if {"chosen", "rejected"} <= set(columns):
        why = "it holds preferences (chosen, rejected), and only answers are trained here"
        fix = "train on the chosen answers: data.format: prompt=prompt,completion=chosen"
    else:
        why = f"its columns are {', '.join(map(repr, columns[:12])) or 'none'}"
        wanted = dict.fromkeys(column for fmt in FORMATS for column in fmt.needs)
        near = {c: difflib.get_close_matches(c.lower(), wanted, n=1) for c in columns}
        hints = [f"{match[0]}={c}" for c, match in near.items() if match]
        fix = f"map the columns: data.format: {','.join(hints) or 'prompt=COLUMN,completion=COLUMN'}"
    return DataError("the rows fit no known format", why=why, fix=fix, where=rows[0].where if rows else None)
