"""A statement that goes beyond its number: what it rests on, what would refute it, and what to do about it."""

from dataclasses import dataclass
from typing import Any

from .number import Number


@dataclass(frozen=True)
class Judgement:
    """name: short, for filters and tests. number: carries the null and the interval. after: what to do next."""

    name: str
    statement: str
    number: Number
    refuted_by: str
    after: str

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        return {
            "name": self.name,
            "statement": self.statement,
            "number": self.number.json(),
            "refuted_by": self.refuted_by,
            "next": self.after,
        }
