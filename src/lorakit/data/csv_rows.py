"""CSV and TSV to rows; every cell is text."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import DataError
from .rows import BadRow, Row
from .textfile import LINE_LIMIT, lines

_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def parse_csv(path: Path, bad: list[BadRow], notices: list[str]) -> Iterator[Row]:
    """Give the rows of a CSV file with a header; ';' separates where the header has it and no ','."""
    source = lines(path, bad)
    _, header = next(source, (1, ""))
    delimiter = ";" if ";" in header and "," not in header else ","
    if delimiter == ";":
        notices.append(f"{path}: columns are separated by ';'")
    yield from _quoted_rows(path, header, source, delimiter, bad)


def parse_tsv(path: Path, bad: list[BadRow], notices: list[str]) -> Iterator[Row]:
    """Give the rows of a TSV file with a header.

    Quotes are ordinary characters (as in GLUE) unless every cell that begins with one is a whole quoted cell. A file
    whose lines differ in their number of cells is read by CSV's rules, where a quoted cell may hold tabs and line ends.
    """
    numbered = [(number, line.rstrip("\r\n")) for number, line in lines(path, bad) if not line.isspace()]
    if not numbered:
        return
    split = [line.split("\t") for _, line in numbered]
    quoted = [cell for cells in split for cell in cells if cell.startswith('"')]
    if quoted and len({len(cells) for cells in split}) > 1:
        rest = ((number, line + "\n") for number, line in numbered[1:])
        yield from _quoted_rows(path, numbered[0][1], rest, "\t", bad)
        return
    unquote = bool(quoted) and all(_QUOTED.fullmatch(cell) for cell in quoted)
    if quoted and not unquote:
        notices.append(f"{path}: quotes are not balanced, so they are ordinary characters (csv.QUOTE_NONE)")
    names = _header(path, split[0])
    for (number, _), cells in zip(numbered[1:], split[1:], strict=True):
        if unquote:
            cells = [cell[1:-1].replace('""', '"') if cell.startswith('"') else cell for cell in cells]
        yield from _row(names, cells, f"{path}:{number}", bad)


def _quoted_rows(
    path: Path, header: str, source: Iterator[tuple[int, str]], delimiter: str, bad: list[BadRow]
) -> Iterator[Row]:
    number = 1

    def texts() -> Iterator[str]:
        nonlocal number
        for number, line in source:  # noqa: B007 (number is read below, where a row begins)
            yield line

    limit = csv.field_size_limit(LINE_LIMIT)  # the module knows only one limit for the whole process
    try:
        try:
            names = _header(path, next(csv.reader([header], delimiter=delimiter), []))
        except csv.Error as error:
            raise DataError(f"{path}:1  broken header: {error}", fix="the first line names the columns") from None
        reader = csv.reader(texts(), delimiter=delimiter, strict=True)
        while True:
            lines_before = reader.line_num
            try:
                cells = next(reader, None)
            except csv.Error as error:
                bad.append(BadRow(f"{path}:{number}", f"broken row: {error}"))
                continue
            if cells is None:
                return
            begin = number - (reader.line_num - lines_before) + 1
            if cells:
                yield from _row(names, cells, f"{path}:{begin}", bad)
    finally:
        csv.field_size_limit(limit)


def _header(path: Path, names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}:1  the header gives {', '.join(map(repr, twice))} twice", fix="rename one column")
    return names


def _row(names: list[str], cells: list[str], where: str, bad: list[BadRow]) -> Iterator[Row]:
    if len(cells) != len(names):
        bad.append(BadRow(where, f"{len(cells)} cells where the header has {len(names)}"))
    else:
        yield Row(dict(zip(names, cells, strict=True)), where)
