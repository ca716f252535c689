"""lorakit: train, understand and ship low-rank adapters.

Importing this imports nothing: each name brings its module (torch and nothing heavier, for most) when it is first used,
so that `lorakit --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import train
    from .core.adapter import AbstractAdapter, AdditiveAdapter, Method
    from .core.attach import active, adapters, attach, detach, disabled, names, trainable, use
    from .core.calibrate import calibrate
    from .core.errors import LorakitError
    from .core.merge import merge, unmerge
    from .core.registry import INITS, METHODS
    from .core.summary import summary
    from .core.target import Target
    from .interop.adapter_directory import load, save
    from .methods.lora import LoRA
    from .models.quantize import quantize

__version__ = "0.1.0"

__all__ = [
    "INITS",
    "METHODS",
    "AbstractAdapter",
    "AdditiveAdapter",
    "LoRA",
    "LorakitError",
    "Method",
    "Target",
    "active",
    "adapters",
    "attach",
    "calibrate",
    "detach",
    "disabled",
    "load",
    "merge",
    "names",
    "quantize",
    "save",
    "summary",
    "train",
    "trainable",
    "unmerge",
    "use",
]

_MODULES = {
    "api": ("train",),
    "core.adapter": ("AbstractAdapter", "AdditiveAdapter", "Method"),
    "core.attach": ("active", "adapters", "attach", "detach", "disabled", "names", "trainable", "use"),
    "core.calibrate": ("calibrate",),
    "core.errors": ("LorakitError",),
    "core.merge": ("merge", "unmerge"),
    "core.registry": ("INITS", "METHODS"),
    "core.summary": ("summary",),
    "core.target": ("Target",),
    "interop.adapter_directory": ("load", "save"),
    "methods.lora": ("LoRA",),
    "models.quantize": ("quantize",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    value = vars(importlib.import_module(f".{_HOME[name]}", __name__))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
