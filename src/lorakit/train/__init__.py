"""A run from configuration to adapter: read `run.py` first, then `loop.py`.

The package can also be called: `lorakit.train(model, tokenizer, data=...)` is `lorakit.api.train`. A package and a function
cannot share a name otherwise: importing the package would put it in the function's place.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from ..api import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
