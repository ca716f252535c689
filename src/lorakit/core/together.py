"""Several resident adapters in one forward and backward pass, each on the documents of its own.

    y = base.frozen(x)                                all rows of all adapters, one product with W
    y[rows of i] += s_i drop(x[rows of i]) A_i^T B_i^T

A document never sees another (`models/packing.py`), and a layer adds to its rows only what their own adapter gives. So the
outputs, and the gradients of each adapter, are those it has alone; what is shared is the frozen base.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast, final

import torch
from torch import Tensor, nn

from ..kernels.low_rank import Routed, add, applies
from .adapter import AbstractAdapter, Base
from .attach import Adapted, adapters, detach, names, require
from .errors import UsageError
from .low_rank import delta, low_rank_of
from .statistics import Statistics

NAME = "together"
"""What the adapter is called that stands for all of them while they run at once."""


class Part(NamedTuple):
    """One adapter's documents in a pass: their tokens, how many of their positions the loss needs, the seed of its masks."""

    adapter: str
    tokens: int
    kept: int
    seed: int


class Pass:
    """Whose rows are whose in the pass under way; all layers look here."""

    def __init__(self) -> None:
        self.adapters: list[str] = []
        self.runs: dict[int, list[int]] = {}
        self.generators: list[torch.Generator] = []

    def begin(self, parts: Sequence[Part], device: torch.device) -> None:
        """Take the documents of `parts`, one after the other in the batch's only row."""
        self.adapters = [part.adapter for part in parts]
        tokens, kept = [part.tokens for part in parts], [part.kept for part in parts]
        self.runs = {sum(kept): kept, sum(tokens): tokens}
        self.generators = [torch.Generator(device).manual_seed(part.seed) for part in parts]


@final
class TogetherAdapter(AbstractAdapter):
    """Stands on a layer for the adapters that run there at once; they stay where they are."""

    MERGEABLE: ClassVar[bool] = False
    ROLES: ClassVar = {}

    def __init__(self, layer: Adapted, path: str, current: Pass) -> None:
        super().__init__()
        self.config = None
        self._layer = (layer,)  # in a tuple, so that it is no submodule of what stands on it
        self._path, self._pass = path, current

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Do nothing: those it stands for have started."""

    def routed(self, base: Base) -> Routed:
        """Give the change of each adapter of the pass, for its own rows."""
        (layer,), current = self._layer, self._pass
        changes = [low_rank_of(layer.adapters[name], layer, name, self._path) for name in current.adapters]
        drawn = zip(changes, current.generators, strict=True)
        return Routed([change._replace(generator=generator) for change, generator in drawn], current.runs)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Run the layer once, and each adapter on its rows."""
        y, own = base.frozen(x), self.routed(base)
        if base.VECTORS and applies(x) and x.dtype == y.dtype:
            return add(y, x, own)
        rows = x.split(list(own.runs[x.shape[1]]), dim=1)
        return y + torch.cat([delta(part, one, base) for part, one in zip(rows, own.changes, strict=True)], 1).to(
            y.dtype
        )

    def merge(self, weight: Tensor) -> Tensor:
        """Refuse: it is several adapters."""
        raise UsageError("adapters that run together are not one", fix="merge each by its own name")

    def compact(self) -> AbstractAdapter:
        """Refuse to be saved: it is several adapters."""
        raise UsageError("adapters that run together are not one", fix="save each by its own name")


@contextmanager
def together(model: nn.Module, adapter_names: Sequence[str]) -> Generator[Pass]:
    """Let the adapters of these names run at once inside the block: `pass.begin`, then `use(model, NAME)` and the model.

    Raises UsageError for adapters on different layers, and for changes that are not s B A.
    """
    if NAME in names(model):
        raise UsageError(f"there is an adapter {NAME!r} already", fix=f"lk.detach(model, {NAME!r}) first")
    current = Pass()
    layers = _layers(model, adapter_names)
    try:
        for path, layer in layers.items():
            layer.adapters[NAME] = TogetherAdapter(layer, path, current).train(layer.training)
        yield current
    finally:
        if NAME in names(model):
            detach(model, NAME)


def _layers(model: nn.Module, adapter_names: Sequence[str]) -> dict[str, Adapted]:
    """Give path -> layer of the layers that all of them adapt."""
    found: dict[str, Adapted] = {}
    for name in adapter_names:
        require(model, name)
        own = {path: layer for path, layer, _ in adapters(model, name)}
        differing = sorted(own.keys() ^ found.keys()) if found else []
        if differing:
            raise UsageError(
                f"{adapter_names[0]!r} and {name!r} are on different layers: {', '.join(differing[:5])}",
                fix="give them the same targets",
            )
        found = own
        for path, layer, adapter in adapters(model, name):
            low_rank_of(cast(Any, adapter), layer, name, path)
    return found
