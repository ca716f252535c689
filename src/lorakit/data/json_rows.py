"""JSON to rows: one object a line (JSONL), or one array of objects. Stricter than `json.loads`: see `decode`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..core.errors import DataError
from .rows import BadRow, Row, RowError
from .textfile import lines, whole

DEPTH_LIMIT = 200  # values inside each other

_SPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def kind(value: Any) -> str:
    """Name the JSON type of a value."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def parse_jsonl(path: Path, bad: list[BadRow], notices: list[str]) -> Iterator[Row]:
    """Give the rows of a file with one JSON object a line; blank lines are passed over."""
    for number, line in lines(path, bad):
        if line.isspace():
            continue
        try:
            value, end = decode(line, _skip_space(line, 0))
            if (rest := _skip_space(line, end)) < len(line):
                raise RowError("more text behind the object", rest + 1)
            yield Row(_row(value), f"{path}:{number}")
        except RowError as error:
            bad.append(error.at(f"{path}:{number}"))


def parse_json(path: Path, bad: list[BadRow], notices: list[str]) -> Iterator[Row]:
    """Give the rows of a JSON array of objects; a file that begins with an object is read as JSONL."""
    text = whole(path)
    at = _skip_space(text, 0)
    if text.startswith("{", at):
        notices.append(f"{path} holds one JSON object a line (JSONL)")
        yield from parse_jsonl(path, bad, notices)
        return
    if at < len(text) and text[at] != "[":
        _stop(path, text, at, "expected an array: [{...}, {...}]")
    line, counted, at = 1, 0, _skip_space(text, at + 1)
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decode(text, at)
            yield Row(_row(value), f"{path}:{line}")
        except RowError as error:
            end = _end(path, text, at, error)
            bad.append(BadRow(_place(path, text, (error.column or at + 1) - 1), str(error)))
        at = _skip_space(text, end)
        if not text.startswith((",", "]"), at):
            _stop(path, text, at, "expected ',' or ']'; is the file cut off?")
        at = _skip_space(text, at + 1) if text[at] == "," else at


def decode(text: str, at: int) -> tuple[Any, int]:
    """Give the JSON value that begins at `at`, and where it ends.

    Raises RowError, its column counted from the start of `text`, for what is no JSON and also for what `json.loads`
    lets through: a key given twice, NaN and Infinity, half a surrogate pair, and nesting deeper than DEPTH_LIMIT.
    """
    try:
        value, end = _STRICT.raw_decode(text, at)
    except json.JSONDecodeError as error:
        cut = "; is the line cut off?" if error.pos >= len(text.rstrip()) else ""
        raise RowError(f"broken JSON: {error.msg}{cut}", error.pos + 1) from None
    except _Twice as twice:
        second = text.find(json.dumps(twice.key, ensure_ascii=False), text.find(f'"{twice.key}"', at) + 1)
        raise RowError(f"the key {twice.key!r} is given twice", second + 1 or at + 1) from None
    except RecursionError:
        raise RowError(f"nested deeper than {DEPTH_LIMIT} levels", at + 1) from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise RowError(f"broken JSON: {error}", at + 1) from None
    if text.count("[", at, end) + text.count("{", at, end) > DEPTH_LIMIT and _depth(value) > DEPTH_LIMIT:
        raise RowError(f"nested deeper than {DEPTH_LIMIT} levels", at + 1)
    if surrogate := _SURROGATE.search(text, at, end):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RowError("half a surrogate pair is not a character", surrogate.start() + 1) from None
    return value, end


class _Twice(Exception):
    def __init__(self, key: str) -> None:
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_LENIENT = json.JSONDecoder()


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [
        inner for v in level if isinstance(v, dict | list) for inner in (v.values() if isinstance(v, dict) else v)
    ]:
        depth += 1
    return depth


def _row(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        hint = "; an array of rows belongs into a .json file" if isinstance(value, list) else ""
        raise RowError(f"the row is {kind(value)}, not an object{hint}")
    return value


def _skip_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _end(path: Path, text: str, at: int, error: RowError) -> int:
    try:
        return _LENIENT.raw_decode(text, at)[1]
    except (ValueError, RecursionError):  # nothing behind this element can be trusted
        _stop(path, text, (error.column or at + 1) - 1, str(error))


def _place(path: Path, text: str, at: int) -> str:
    return f"{path}:{text.count(chr(10), 0, at) + 1}:{at - text.rfind(chr(10), 0, at)}"


def _stop(path: Path, text: str, at: int, reason: str) -> NoReturn:
    raise DataError(f"{_place(path, text, at)}  {reason}", fix="repair the file; JSONL can be read past a broken row")
