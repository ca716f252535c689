"""What an init may look at when it fills the factors of one layer."""

from typing import NamedTuple

from torch import Tensor

from .adapter import Base, Method
from .errors import UsageError
from .registry import INITS
from .stack import parts_of
from .statistics import Statistics


class Start(NamedTuple):
    """A layer whose factors start: the change will be scale * B A."""

    base: Base
    scale: float
    statistics: Statistics | None

    def measured(self, what: str) -> Tensor:
        """Give one of the statistics. Raises UsageError if it was not measured."""
        value = vars(self.statistics)[what] if self.statistics is not None else None
        if value is None:
            raise UsageError(f"this init needs {what!r} of each layer, which was not measured", fix=FIXES[what])
        return value


_CALIBRATE = "attach(..., statistics=lk.calibrate(model, method, batches, loss)); `lorakit train` does it by itself"
FIXES = {
    "inputs": _CALIBRATE,
    "mean": _CALIBRATE,
    "gradient": _CALIBRATE,
    "residual": "attach(..., statistics=lk.quantize(model, 'nf4', method)), or set model.quantize in a configuration",
}


def needs(method: Method) -> frozenset[str]:
    """Give the fields of `Statistics` that must be known of each layer before adapters of this method can start."""
    inits = [vars(part)["init"] for part in parts_of(method) if "init" in vars(part)]
    own = vars(type(method)).get("NEEDS", frozenset())
    return own.union(*(vars(INITS.module(init)).get("NEEDS", frozenset()) for init in inits))
