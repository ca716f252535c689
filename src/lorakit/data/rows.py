"""Rows as they were read, and the rows that cannot be used."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source: its columns, and where it stands (`train.jsonl:17`)."""

    fields: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str


class RowError(ValueError):
    """One row cannot be used. Collected as a BadRow, so that a user sees every bad row at once."""

    def __init__(self, reason: str, column: int | None = None) -> None:
        super().__init__(reason)
        self.column = column

    def at(self, where: str) -> BadRow:
        """Give the bad row for a row that stands at `where`."""
        return BadRow(where if self.column is None else f"{where}:{self.column}", str(self))


class Rows(list[Row]):
    """Rows in file order, with the ones left out (`bad`) and what a user should know of the reading (`notices`)."""

    def __init__(self, rows: Iterable[Row] = (), bad: Iterable[BadRow] = (), notices: Iterable[str] = ()) -> None:
        super().__init__(rows)
        self.bad, self.notices = list(bad), list(notices)

    @classmethod
    def of(cls, items: Iterable[Mapping[str, Any]]) -> "Rows":
        """Give rows made in Python instead of read: one mapping of columns each."""
        return cls(Row(dict(item), f"row {number}") for number, item in enumerate(items, 1))


def refuse(bad: Sequence[BadRow], total: int) -> DataError:
    """Give the error for `bad` rows out of `total`: the first one in full, the places of the rest."""
    first = bad[0]
    alike = [row for row in bad if row.reason == first.reason]
    others = len(bad) - len(alike)
    drop = ", or drop them: --skip-bad-rows (data.skip_bad_rows: true)" if len(bad) < total else ""
    return DataError(
        f"{first.where}  {first.reason} ({len(alike)} of {total} rows)",
        why=f"{others} more rows have other faults, first {places([r for r in bad if r not in alike])}"
        if others
        else None,
        fix=f"repair these rows{drop}",
        where=places(alike),
    )


def places(bad: Sequence[BadRow], show: int = 5) -> str:
    """List where the first few bad rows stand."""
    more = f" and {len(bad) - show} more" if len(bad) > show else ""
    return ", ".join(row.where for row in bad[:show]) + more
