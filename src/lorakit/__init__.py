"""lorakit: train, understand and ship low-rank adapters.

Importing this imports torch and nothing heavier; `train` and the file functions import what they need when they are called.
"""

from typing import Any

from .core.adapter import AbstractAdapter, AdditiveAdapter, Method
from .core.attach import active, adapters, attach, detach, disabled, names, trainable, use
from .core.errors import LorakitError
from .core.merge import merge, unmerge
from .core.registry import INITS, METHODS
from .core.summary import summary
from .core.target import Target
from .methods.lora import LoRA

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
    "detach",
    "disabled",
    "load",
    "merge",
    "names",
    "save",
    "summary",
    "train",
    "trainable",
    "unmerge",
    "use",
]


def __getattr__(name: str) -> Any:
    if name in ("save", "load"):
        from .interop import adapter_directory

        return vars(adapter_directory)[name]
    if name == "train":
        from .train.run import train

        return train
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
