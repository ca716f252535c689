"""Storage formats of frozen weights: one file per package that brings them, under the package's name.

A file registers how its tensors are read and made (`core/weight.py`) and, where a layer needs more, the kind of that layer
(`core/kinds.py`); it is imported when a layer or tensor of its package is met. `LAYERS` in it makes layers: format -> function
from an `nn.Linear` to the layer that stores its weight so.
"""

import importlib.util
from collections.abc import Callable, Mapping

from torch import nn

from ..core.errors import UsageError
from ..core.registry import BASES

FORMATS: Mapping[str, str] = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "bitsandbytes"}
"""The formats that a configuration can ask for, and the file that makes them."""


def maker(name: str) -> Callable[[nn.Linear], nn.Linear]:
    """Give the function that makes a layer of format `name` from a linear layer. Raises UsageError as `require` does."""
    require(name)
    return BASES[FORMATS[name]][name]


def require(name: str) -> None:
    """Raise UsageError for a format there is not, and if its package is not installed; nothing is imported."""
    if name not in FORMATS:
        raise UsageError(f"there is no storage format {name!r}", fix=f"choose one of {', '.join(FORMATS)}")
    package = FORMATS[name]
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"{name} needs the package {package}, which is not installed", fix="pip install 'lorakit[quant]'"
        )
