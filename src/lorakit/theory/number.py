"""A number as a user sees it: what kind of statement it is, what chance alone would give, and the formula it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from .formulas import FORMULAS


class Kind(StrEnum):
    """How far a number can be trusted."""

    EXACT = "exact"
    """An identity, up to rounding. Of an adapter: a function of the change s·B·A alone, the same for (B R, R^-1 A)."""
    ESTIMATE = "estimate"
    """A statistic of a sample; it has an interval or a standard error."""
    BOUND = "bound"
    """True, and possibly far from what is; it comes with the ratio of the bound to the trivial one (its vacuity)."""
    HEURISTIC = "heuristic"
    """A rule that was seen to hold on the runs its formula names, and is derived from nothing."""
    PARAMETRISATION = "parametrisation"
    """Exact for these factors B and A, but other factors of the same change give another value: never a verdict."""


@dataclass(frozen=True, slots=True)
class Number:
    """A value with its kind, its formula and, where there are such, its null and its interval.

    formula: a key of `FORMULAS`, which names the test that proves it.
    null: the value of the same statistic where there is nothing to see (random factors of the same shape, random directions).
    interval: 95 % unless the formula says otherwise. n: samples behind an estimate. inputs: what it was computed from.
    cost: seconds, where it is worth knowing. A value that is not there is NaN and stands in JSON as null: "not measured".
    """

    value: float
    kind: Kind
    formula: str
    null: float | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    cost: float | None = None

    def __post_init__(self) -> None:
        if self.formula not in FORMULAS:
            raise KeyError(f"no formula {self.formula!r} in theory/formulas.py")

    def __float__(self) -> float:
        return self.value

    def json(self) -> dict[str, Any]:
        """Give {value, kind, null, ci, n, inputs, cost, formula_id}; what is NaN or infinite becomes None."""
        low_high = None if self.interval is None else [_finite(v) for v in self.interval]
        return {
            "value": _finite(self.value),
            "kind": str(self.kind),
            "null": _finite(self.null),
            "ci": low_high,
            "n": self.n,
            "inputs": dict(self.inputs),
            "cost": self.cost,
            "formula_id": self.formula,
        }


def _finite(value: float | None) -> float | None:
    return None if value is None or not abs(value) < float("inf") else float(value)
