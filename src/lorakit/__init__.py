"""lorakit: train, understand and ship low-rank adapters.

Importing this imports nothing: each name brings its module (torch and nothing heavier, for most) when it is first used,
so that `lorakit --help` does not wait for torch. Every method's dataclass is here too, by the name it has: `lk.DoRA` is
that of `methods/dora.py`, `lk.LoRAFA` that of `methods/lora_fa.py`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import train, train_many
    from .combine.bank import bank
    from .combine.mixture import mixture
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
    "bank",
    "calibrate",
    "detach",
    "disabled",
    "load",
    "merge",
    "mixture",
    "names",
    "quantize",
    "save",
    "summary",
    "train",
    "train_many",
    "trainable",
    "unmerge",
    "use",
]

_MODULES = {
    "api": ("train", "train_many"),
    "combine.bank": ("bank",),
    "combine.mixture": ("mixture",),
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
    value = vars(importlib.import_module(f".{_HOME[name]}", __name__))[name] if name in _HOME else _method(name)
    if value is None:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    globals()[name] = value
    return value


def _method(name: str) -> Any:
    """Give the method whose dataclass has this name, or None. Of all files only the one of that name is imported."""
    from .core.registry import METHODS

    for file in METHODS:
        if file.replace("_", "") == name.lower() and METHODS[file].__name__ == name:
            return METHODS[file]
    return None


def __dir__() -> list[str]:
    from .core.registry import METHODS

    return sorted({*globals(), *__all__, *(method.__name__ for method in METHODS.values())})
