"""Where a command's output goes: results on stdout, notes on stderr; colour and live lines only on a real terminal."""

import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

COLORS = {"red": "31", "green": "32", "yellow": "33", "grey": "90", "bold": "1"}

_log = logging.getLogger("lorakit")


class _ToStderr(logging.Handler):
    """Writes to whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{record.getMessage()}\n")


def set_verbosity(*, quiet: bool, verbose: bool) -> None:
    """Let notes through: none, the usual ones, or all."""
    for old in list(_log.handlers):
        _log.removeHandler(old)
    _log.addHandler(_ToStderr())
    _log.propagate = False
    _log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


def quiet() -> bool:
    """Say whether progress and notes are unwanted."""
    return not _log.isEnabledFor(logging.INFO)


def note(text: str) -> None:
    """Say something on stderr that is not a result."""
    _log.info(text)


def notices(lines: Sequence[str]) -> None:
    """Say on stderr what a user should know about the input, each on its line."""
    for line in lines:
        note(f"{style('note:', 'yellow', sys.stderr)} {line}")


def result(text: str) -> None:
    """Print a result on stdout."""
    sys.stdout.write(f"{text}\n")


def json_result(value: Any) -> None:
    """Print a result on stdout for machines: one JSON document; what JSON has no number for becomes null."""
    result(json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str))


def styled(stream: TextIO) -> bool:
    """Say whether a stream is a terminal that wants colour (NO_COLOR, TERM=dumb, CI: no; FORCE_COLOR: yes)."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return live(stream)


def live(stream: TextIO) -> bool:
    """Say whether a line on this stream can be written over."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


def style(text: str, color: str, stream: TextIO) -> str:
    """Colour a text if the stream shows colours."""
    return f"\x1b[{COLORS[color]}m{text}\x1b[0m" if styled(stream) else text


def table(rows: Sequence[Sequence[object]]) -> str:
    """Give rows as columns; a column of numbers (below its heading) is flush right."""
    columns = []
    for values in zip(*rows, strict=True):
        texts = [_cell(value) for value in values]
        width = max(map(len, texts))
        numbers = len(values) > 1 and all(isinstance(value, int | float) for value in values[1:])
        columns.append([text.rjust(width) if numbers else text.ljust(width) for text in texts])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
