"""Adapters and base weights for commands that read matrices and load no model."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from .opened import base_of, check_base, read_json

if TYPE_CHECKING:
    from ..analysis.base_weights import BaseWeights
    from ..analysis.loaded import LoadedAdapter
    from ..analysis.skeleton import Layer


def open_base(name: str) -> "BaseWeights":
    """Give the weights of a base model by its name."""
    from ..analysis.base_weights import BaseWeights
    from ..models.resolve import resolve

    return BaseWeights(resolve(name))


def base_for(adapter: Path, named: str | None) -> "BaseWeights":
    """Give the base of an adapter: the one that was named, else the one it names. FileError if its weights are others."""
    side = read_json(adapter / "lorakit.json") if (adapter / "lorakit.json").exists() else {}
    chosen = named or base_of(adapter)
    check_base(adapter, side, chosen, named=named is not None)
    return open_base(chosen)


def open_adapter(adapter: Path, named: str | None) -> "LoadedAdapter":
    """Read an adapter. Its base is opened only if its file does not say the shapes."""
    from ..analysis.loaded import load_adapter

    @functools.cache
    def base() -> "BaseWeights":
        return base_for(adapter, named)

    def layer(path: str) -> "Layer":
        return base().layer(path)

    return load_adapter(adapter, layer)
