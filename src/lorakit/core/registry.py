"""Names by file: `methods/dora.py` is the method `dora`. A new file is known the moment it exists; there is no list to keep."""

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from .errors import UsageError


class Registry(Mapping[str, Any]):
    """The files of a sub-package by name, each giving one attribute; a file is imported when it is first asked for."""

    def __init__(self, package: str, attribute: str, what: str) -> None:
        self.package, self.attribute, self.what = package, attribute, what
        self._modules: dict[str, ModuleType] = {}

    # A registry is itself only: comparing the contents, as a Mapping does, would import every file.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[str]:
        spec = importlib.util.find_spec(self.package)
        locations = list(spec.submodule_search_locations or []) if spec else []
        return (m.name for m in pkgutil.iter_modules(locations) if not m.name.startswith("_"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        return getattr(self.module(name), self.attribute)

    def module(self, name: str) -> ModuleType:
        """Give the file of this name, for what else it declares. Raises UsageError with the names there are."""
        if name in self._modules:
            return self._modules[name]
        names = sorted(self)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"unknown {self.what} {name!r}", fix=f"{hint}there are: {', '.join(names)}")
        self._modules[name] = importlib.import_module(f"{self.package}.{name}")
        return self._modules[name]

    def name_of(self, value: object) -> str:
        """Give the file name under which `value` is registered."""
        return next(name for name in self if self[name] is value)


METHODS = Registry("lorakit.methods", "METHOD", "method")
INITS = Registry("lorakit.init", "start", "init")
BASES = Registry("lorakit.bases", "LAYERS", "storage format")
