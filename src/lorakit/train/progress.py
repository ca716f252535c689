"""What a person sees while a run trains: one live line on a terminal, a plain line every few seconds anywhere else.

    step 26/51 ▕██████▌     ▏ 51% · loss 0.024 ▇▅▃▂▁▁ · eval 0.03 · 233 tok/s · 1.1 GB · ETA 0:00:24

Nothing here may stop a training run: a closed pipe, a narrow window, a clock that jumps and text full of control codes
are all ordinary.
"""

import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from types import TracebackType
from typing import Any, Self, TextIO

REDRAW_SECONDS = 0.1
PLAIN_SECONDS = 5.0
BAR_WIDTH = 12
SPARK_WIDTH = 12
SAMPLE_WIDTH = 200
SPEED_WINDOW = 20  # steps over which the time left is estimated

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"
_GREEN, _DIM, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


class Progress:
    """The display of one run of `total_steps` steps on `stream` (stderr).

    `live=None` finds out whether the stream is a terminal that can redraw a line; CI and TERM=dumb say it cannot.
    NO_COLOR turns colours off. `seconds` is the time between two drawings. `label` stands before every line.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        *,
        live: bool | None = None,
        seconds: float | None = None,
        label: str = "",
    ) -> None:
        self.total_steps = total_steps
        self.stream = sys.stderr if stream is None else stream
        self.live = _can_redraw(self.stream) if live is None else live
        self.color = self.live and not os.environ.get("NO_COLOR")
        self.unicode = _can_encode(self.stream, _LEVELS + "▕·…→")
        self._every = seconds if seconds is not None else REDRAW_SECONDS if self.live else PLAIN_SECONDS
        self._shown: float | None = None  # when something was last drawn
        self._times: deque[tuple[int, float]] = deque(maxlen=SPEED_WINDOW + 1)
        self._losses: list[float] = []
        self._record: Mapping[str, Any] = {}
        self._eval_loss: float | None = None
        self._pending = False  # whether the newest record is not on the screen yet
        self._drawn = False  # whether a live line stands on the screen
        self._closed = False
        self._label = f"{label}: " if label else ""

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a record of `metrics.jsonl`: step, loss and, where present, tok_s and mem_gb."""
        now = time.monotonic()
        self._times.append((record["step"], now))
        self._losses.append(_number(record.get("loss")))
        self._record, self._pending = record, True
        last = record["step"] >= self.total_steps
        if self._shown is None or now - self._shown >= self._every or last:
            self._show(now)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Show an evaluation as a line that stays."""
        self._eval_loss = _number(record.get("eval_loss"))
        parts = [f"evaluation at step {record['step']}: loss {_short(self._eval_loss)}"]
        if "eval_accuracy" in record:
            parts.append(f"accuracy {_number(record['eval_accuracy']):.1%}")
        self.message(f" {self._dot} ".join(parts))

    def sample(self, prompt: str, text: str) -> None:
        """Show an answer to a fixed prompt, on two lines that stay; control characters are spelled out."""
        arrow = "→" if self.unicode else "->"
        self._lines([f"  {self._clip(_plain(prompt))}", f"    {arrow} {self._clip(_plain(text))}"])

    def message(self, text: str) -> None:
        """Show lines that stay above the live line."""
        self._lines([f"{self._label}{line}" for line in text.splitlines() or [""]])

    def close(self) -> None:
        """Show the last state and end the live line. Calling it again does nothing."""
        if self._closed:
            return
        if self._pending:
            self._show(time.monotonic())
        if self._drawn:
            self._write("\n")
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _dot(self) -> str:
        return "·" if self.unicode else "|"

    def _show(self, now: float) -> None:
        self._shown, self._pending = now, False
        if self.live:
            self._write("\r" + self._fitted(self._columns()) + "\x1b[K")
            self._drawn = True
        else:
            self._write(f" {self._dot} ".join([self._count(), *self._facts()]) + "\n")

    def _lines(self, lines: Sequence[str]) -> None:
        erase = "\r\x1b[K" if self._drawn else ""
        self._write(erase + "".join(self._encodable(line) + "\n" for line in lines))
        if self._drawn:
            self._write(self._fitted(self._columns()) + "\x1b[K")

    def _fitted(self, columns: int) -> str:
        """Give the live line, leaving out its least important parts until it fits into one row of the terminal."""
        facts = self._facts()
        for bar, spark, count in self._layouts(len(facts)):
            plain = self._compose(facts[:count], bar, spark, color=False)
            if len(plain) < columns:
                return self._compose(facts[:count], bar, spark, color=self.color)
        return self._count()[: max(columns - 1, 0)]

    @staticmethod
    def _layouts(facts: int) -> Iterator[tuple[bool, bool, int]]:
        """Give (with a bar, with a sparkline, number of facts) from the fullest line to the barest."""
        yield True, True, facts
        yield True, False, facts
        for count in range(facts, 0, -1):
            yield False, False, count

    def _compose(self, facts: Sequence[str], bar: bool, spark: bool, *, color: bool) -> str:
        green, dim, reset = (_GREEN, _DIM, _RESET) if color else ("", "", "")
        head = self._count()
        if bar:
            left, right = ("▕", "▏") if self.unicode else ("[", "]")
            share = self._record["step"] / max(self.total_steps, 1)
            head += (
                f" {left}{green}{progress_bar(share, BAR_WIDTH, ascii_only=not self.unicode)}{reset}{right} {share:.0%}"
            )
        first, *others = facts
        if spark and self.unicode:
            first += f" {green}{sparkline(self._losses[:: max(len(self._losses) // 1000, 1)], SPARK_WIDTH)}{reset}"
        return f" {dim}{self._dot}{reset} ".join([head, first, *others])

    def _count(self) -> str:
        return f"{self._label}step {self._record['step']}/{self.total_steps}"

    def _facts(self) -> list[str]:
        """Give the numbers of the line, the most important first."""
        facts = [f"loss {_short(self._losses[-1])}"]
        if self._eval_loss is not None:
            facts.append(f"eval {_short(self._eval_loss)}")
        left = self._seconds_left()
        speed, memory = _number(self._record.get("tok_s")), _number(self._record.get("mem_gb"))
        if math.isfinite(speed):
            facts.append(f"{speed:.0f} tok/s")
        if math.isfinite(memory):
            facts.append(f"{memory:.1f} GB")
        if left is not None:
            facts.append(f"ETA {clock(left)}")
        return facts

    def _seconds_left(self) -> float | None:
        (first, began), (last, ended) = self._times[0], self._times[-1]
        if last <= first:
            return None
        return max(ended - began, 0.0) / (last - first) * max(self.total_steps - last, 0)

    def _columns(self) -> int:
        with suppress(OSError, ValueError, AttributeError):  # not a real terminal, or a window of size zero
            if "COLUMNS" not in os.environ and (columns := os.get_terminal_size(self.stream.fileno()).columns) > 0:
                return columns
        return shutil.get_terminal_size().columns

    def _clip(self, text: str) -> str:
        dots = "…" if self.unicode else "..."
        return text if len(text) <= SAMPLE_WIDTH else text[: SAMPLE_WIDTH - len(dots)] + dots

    def _encodable(self, text: str) -> str:
        encoding = self.stream.encoding or "utf-8"
        return text.encode(encoding, errors="backslashreplace").decode(encoding)

    def _write(self, text: str) -> None:
        if not self._closed:
            try:
                self.stream.write(text)
                self.stream.flush()
            except (OSError, ValueError):  # the reader of the pipe is gone: go on training, silently
                self._closed = True


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """Draw values as at most `width` blocks from ▁ (the lowest) to █ (the highest), each the mean of its stretch.

    What is not finite is left out of the means; a stretch with nothing finite is a space.
    """
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    means = [_mean(values[a:b]) for a, b in pairwise(edges)]
    finite = [m for m in means if m is not None]
    if not finite:
        return " " * count
    largest = max(map(abs, finite)) or 1.0  # so that no difference overflows
    low, high = min(finite) / largest, max(finite) / largest
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if m is None else _LEVELS[round((m / largest - low) * scale)] for m in means)


def progress_bar(share: float, width: int = BAR_WIDTH, *, ascii_only: bool = False) -> str:
    """Draw a share between 0 and 1 as a bar of exactly `width` characters, in steps of an eighth of one."""
    share = min(max(share, 0.0), 1.0)
    if ascii_only:
        return ("#" * math.floor(share * width)).ljust(width)
    eighths = math.floor(share * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def clock(seconds: float) -> str:
    """Write a duration as hours:minutes:seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _mean(values: Sequence[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(v / len(finite) for v in finite) if finite else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not a number"


def _plain(text: str) -> str:
    """Put text on one line and spell out control characters, which a model may well produce."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _can_redraw(stream: TextIO) -> bool:
    if os.environ.get("TERM") == "dumb" or os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def _can_encode(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
