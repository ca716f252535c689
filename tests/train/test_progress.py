"""The progress display, seen through a terminal of a few lines of Python, a pipe and a real pseudo-terminal."""

import io
import os
import re
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.train import progress as module
from lorakit.train.progress import Progress, clock, progress_bar, sparkline

BLOCKS = "▁▂▃▄▅▆▇█"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def record(step: int, loss: float = 0.024) -> dict[str, float]:
    return {"step": step, "loss": loss, "tok_s": 233.4, "mem_gb": 1.12, "lr": 1e-4}


class Stream(io.StringIO):
    """A stream that says whether it is a terminal, and in what encoding."""

    def __init__(self, *, tty: bool, encoding: str = "utf-8") -> None:
        super().__init__()
        self._tty, self._encoding = tty, encoding

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return self._tty


def screen(text: str, columns: int) -> list[str]:
    """What stands on a terminal after `text`; fails if a line would wrap or an unknown control code is sent."""
    lines, position = [""], 0
    for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.|\n", ANSI.sub("", text), re.DOTALL):
        if token == "\r":
            position = 0
        elif token == "\n":
            lines.append("")
            position = 0
        elif token == "\x1b[K":
            lines[-1] = lines[-1][:position]
        else:
            assert token.isprintable(), repr(token)
            lines[-1] = lines[-1][:position] + token + lines[-1][position + 1 :]
            position += 1
            assert position < columns, "the line reaches the edge"
    return lines


@pytest.fixture(autouse=True)
def ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    yield now


def test_the_live_line(ticking: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Stream(tty=True)
    with Progress(51, stream) as progress:
        for step in range(1, 27):
            ticking[0] += 1.0
            progress.step(record(step, loss=2.0 - step / 13.2))
    assert screen(stream.getvalue(), 120) == [
        "step 26/51 ▕██████      ▏ 51% · loss 0.0303 █▇▇▆▅▅▄▄▃▂▂▁ · 233 tok/s · 1.1 GB · ETA 0:00:25",
        "",
    ]


def test_lines_that_stay_stand_above_the_live_one(ticking: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = Stream(tty=True)
    progress = Progress(10, stream)
    progress.message("first\nsecond")
    progress.step(record(5))
    progress.evaluation({"step": 5, "eval_loss": 0.0312, "eval_accuracy": 0.875})
    progress.sample("a prompt", "an\nanswer \x1b[2J")
    lines = screen(stream.getvalue(), 100)
    assert lines[:-1] == [
        "first",
        "second",
        "evaluation at step 5: loss 0.0312 · accuracy 87.5%",
        "  a prompt",
        r"    → an\nanswer \x1b[2J",
    ]
    assert lines[-1].startswith("step 5/10 ▕██████      ▏ 50% · loss 0.024")
    progress.step(record(10))
    assert "eval 0.0312" in screen(stream.getvalue(), 100)[-1]
    progress.close()
    progress.close()
    assert stream.getvalue().count("\n") == 6


@given(columns=st.integers(1, 140), total=st.integers(1, 10**7), loss=st.floats(allow_nan=True))
def test_no_width_makes_the_line_wrap(columns: int, total: int, loss: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        stream = Stream(tty=True)
        with Progress(total, stream, seconds=0) as progress:
            progress.step(record(max(total // 2, 1), loss))
            progress.step(record(total, loss))
        shown = screen(stream.getvalue(), columns)
        assert len(shown) == 2
        assert shown[0].startswith(f"step {total}/{total}"[: columns - 1])


def test_a_pipe_gets_plain_lines_at_intervals(ticking: list[float]) -> None:
    stream = Stream(tty=False)
    with Progress(100, stream) as progress:
        for step in range(1, 101):
            ticking[0] += 0.3
            progress.step(record(step))
    lines = stream.getvalue().splitlines()
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [1, 18, 35, 52, 69, 86, 100]
    assert all(line.isprintable() for line in lines)
    assert lines[1] == "step 18/100 · loss 0.024 · 233 tok/s · 1.1 GB · ETA 0:00:25"


def test_the_last_step_seen_is_shown_on_closing(ticking: list[float]) -> None:
    stream = Stream(tty=False)
    with Progress(100, stream) as progress:
        for step in range(1, 8):
            progress.step(record(step))
    assert [line.split(" ")[1] for line in stream.getvalue().splitlines()] == ["1/100", "7/100"]


@pytest.mark.parametrize(
    ("name", "value", "live", "color"),
    [
        ("CI", "true", False, False),
        ("TERM", "dumb", False, False),
        ("NO_COLOR", "1", True, False),
        ("CI", "", True, True),
    ],
)
def test_environment(name: str, value: str, live: bool, color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    stream = Stream(tty=True)
    with Progress(3, stream) as progress:
        progress.step(record(1))
        progress.message("note")
    assert ("\r" in stream.getvalue()) == live
    assert bool(ANSI.search(stream.getvalue())) == color


def test_a_terminal_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = Stream(tty=True, encoding="ascii")
    with Progress(4, stream) as progress:
        progress.step(record(2))
        progress.sample("größe", "x")
    stream.getvalue().encode("ascii")
    assert "step 2/4 [######      ] 50% | loss 0.024 | 233 tok/s | 1.1 GB" in screen(stream.getvalue(), 100)


def test_a_clock_that_jumps(ticking: list[float]) -> None:
    stream = Stream(tty=True)
    with Progress(10, stream) as progress:
        for step, jump in enumerate((0.0, -3600.0, 1e9, -1e9, 0.0), start=1):
            ticking[0] += jump
            progress.step(record(step))
    assert "-" not in screen(stream.getvalue(), 80)[0].partition("ETA")[2]


def test_a_reader_that_goes_away_does_not_stop_the_run() -> None:
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    with Progress(5, stream, seconds=0) as progress:
        progress.step(record(1))
        os.close(reader)
        for step in range(2, 6):
            progress.step(record(step))
            progress.message("still here")
    with pytest.raises(BrokenPipeError):
        stream.close()
    closed = io.StringIO()
    closed.close()
    with Progress(5, closed) as progress:
        progress.step(record(1))


def test_a_real_terminal_is_found_and_measured() -> None:
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, (24).to_bytes(2, sys.byteorder) + (40).to_bytes(2, sys.byteorder) + bytes(4))
    with os.fdopen(slave, "w", encoding="utf-8") as stream, Progress(7, stream) as progress:
        assert progress.live
        progress.step(record(3))
        progress.close()
        text = os.read(master, 10_000).decode()
    os.close(master)
    assert screen(text, 40)[0] == "step 3/7 · loss 0.024 · 233 tok/s"


# --- parts --------------------------------------------------------------------------------------------------------


def test_sparkline_values() -> None:
    assert sparkline([]) == ""
    assert sparkline([5.0]) == "▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BLOCKS
    assert sparkline([7, 0, 7], width=3) == "█▁█"
    assert sparkline([1.0, 3.0, 5.0, 7.0], width=2) == "▁█"
    assert sparkline([1.0, float("nan"), 2.0]) == "▁ █"
    assert sparkline([float("nan"), float("inf")]) == "  "
    assert sparkline([3.0, 3.0, 3.0]) == "▁▁▁"
    assert sparkline([-1.7e308, 1.7e308, 5e-324]) == "▁█▅"


@given(st.lists(st.floats(), max_size=60), st.integers(1, 20))
def test_sparkline_of_anything(values: list[float], width: int) -> None:
    drawn = sparkline(values, width)
    assert len(drawn) == min(width, len(values))
    assert set(drawn) <= set(BLOCKS + " ")


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12, unique=True))
def test_sparkline_keeps_the_order(values: list[float]) -> None:
    drawn = sparkline(values)
    assert drawn[values.index(min(values))] == "▁"
    assert drawn[values.index(max(values))] == "█"
    by_value = [drawn[values.index(v)] for v in sorted(values)]
    assert by_value == sorted(by_value)


@given(st.floats(-1, 2), st.integers(1, 30), st.booleans())
def test_progress_bar_has_its_width_and_grows(share: float, width: int, ascii_only: bool) -> None:
    bar = progress_bar(share, width, ascii_only=ascii_only)
    assert len(bar) == width
    filled = "#" if ascii_only else "█"
    assert bar.count(filled) == int(min(max(share, 0), 1) * width)
    assert progress_bar(1.0, width) == "█" * width
    assert progress_bar(0.0, width) == " " * width


def test_clock() -> None:
    assert [clock(s) for s in (0, 24.4, 61, 3600, 360_000)] == ["0:00:00", "0:00:24", "0:01:01", "1:00:00", "100:00:00"]


def test_redrawing_is_limited(ticking: list[float]) -> None:
    stream = Stream(tty=True)
    progress = Progress(100_000, stream)
    for step in range(1, 10_001):
        ticking[0] += 0.0001
        progress.step(record(step))
    assert stream.getvalue().count("\r") <= 1 / module.REDRAW_SECONDS + 1
