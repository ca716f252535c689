"""Text files read within bounds: regular files, UTF-8, a limit on one line and on what a gzip may unfold to."""

import codecs
import stat
import zlib
from collections.abc import Callable, Iterator
from gzip import GzipFile
from io import BufferedReader
from pathlib import Path

from ..core.errors import DataError
from .rows import BadRow, RowError

LINE_LIMIT = 16 * 2**20  # bytes of one line
WHOLE_LIMIT = 2**30  # bytes of a file that is held in memory
BLANK_LIMIT = 10**6  # blank lines in a row
GZIP_FREE, GZIP_RATIO = 16 * 2**20, 100  # a gzip may unfold to the larger of 16 MiB and 100 times its size


def lines(path: Path, bad: list[BadRow]) -> Iterator[tuple[int, str]]:
    """Give (number, line) from 1, line ends kept; a line that is not UTF-8 goes into `bad`. Raises DataError."""
    number, total, blank, limit = 0, 0, 0, _size_limit(path)
    with _open(path) as stream:
        while True:
            number += 1
            line = _read(path, stream.readline, LINE_LIMIT + 1)
            if not line:
                return
            total += len(line)
            if len(line) > LINE_LIMIT:
                raise DataError(f"{path}:{number}  line longer than {LINE_LIMIT >> 20} MiB", fix="one row a line")
            _check_size(path, total, limit)
            blank = blank + 1 if line.isspace() else 0
            if blank > BLANK_LIMIT:
                raise DataError(f"{path}:{number}  more than {BLANK_LIMIT} blank lines", fix="remove them")
            if number == 1:
                line = _without_mark(path, line)
            try:
                yield number, decode(line)
            except RowError as error:
                bad.append(error.at(f"{path}:{number}"))


def whole(path: Path) -> str:
    """Give the text of a file; raises DataError."""
    blocks, total, limit = [], 0, min(_size_limit(path), WHOLE_LIMIT)
    with _open(path) as stream:
        while block := _read(path, stream.read, 2**20):
            blocks.append(block)
            total += len(block)
            _check_size(path, total, limit)
    content = _without_mark(path, b"".join(blocks))
    try:
        return decode(content)
    except RowError:
        for number, line in enumerate(content.split(b"\n"), 1):
            try:
                decode(line)
            except RowError as error:
                raise DataError(f"{path}:{number}:{error.column}  {error}", fix="save the file as UTF-8") from None
        raise


def decode(line: bytes) -> str:
    """Decode UTF-8; raises RowError with the column of the first wrong byte, counted in characters from 1."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        raise RowError(f"byte 0x{line[error.start]:02x} is not UTF-8", column) from None


def check_regular(path: Path) -> None:
    """Refuse a pipe, which could block, and a device, which could never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{path} is not a regular file", fix="give a file, not a pipe or a device")


def _open(path: Path) -> GzipFile | BufferedReader:
    check_regular(path)
    return GzipFile(path) if path.suffix == ".gz" else path.open("rb")


def _read(path: Path, read: Callable[[int], bytes], size: int) -> bytes:
    try:
        return read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read to its end", why=str(error), fix="copy or pack the file again"
        ) from None


def _without_mark(path: Path, start: bytes) -> bytes:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start[:4]:
        raise DataError(f"{path}:1:1  the file is UTF-16 or UTF-32", fix="save the file as UTF-8")
    return start.removeprefix(codecs.BOM_UTF8)


def _size_limit(path: Path) -> int:
    return max(GZIP_FREE, GZIP_RATIO * path.stat().st_size) if path.suffix == ".gz" else 2**62


def _check_size(path: Path, total: int, limit: int) -> None:
    if total > limit:
        raise DataError(
            f"{path} unfolds to more than {limit >> 20} MiB",
            why="a small gzip that unfolds to this much could fill the memory",
            fix="unpack it first; write large data as JSONL, which is read line by line",
        )
