"""How the trainable parameters move: which group each belongs to, the optimizer, the learning-rate schedule."""

from collections.abc import Iterator

from ..core.adapter import Method
from ..core.registry import Registry
from ._base import Accumulating
from ._probe import refusal
from .groups import Factors, Groups, OptimSettings, parameter_groups, role, scale_learning_rates, state_bytes
from .schedules import SCHEDULES, schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Accumulating",
    "Factors",
    "Groups",
    "OptimSettings",
    "parameter_groups",
    "refuses",
    "role",
    "scale_learning_rates",
    "schedule",
    "state_bytes",
]


class _Optimizers(Registry):
    """Every file of this package is an optimizer, except the two that all optimizers share."""

    def __iter__(self) -> Iterator[str]:
        return (name for name in super().__iter__() if name not in ("groups", "schedules"))


OPTIMIZERS = _Optimizers("lorakit.optim", "build", "optimizer")


def refuses(name: str, settings: OptimSettings, method: Method) -> str | None:
    """Give the reason why the optimizer `name` cannot train a method, as far as it is known without a model."""
    return refusal(OPTIMIZERS, name, settings, method)
