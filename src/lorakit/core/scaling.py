"""A resident adapter at another strength: γ times its change, without a copy of anything.

Inside `with scalable(model, name) as strengths:` each additive adapter stands behind a `Scaled`, whose γ may be a number (a
sweep) or a leaf of the graph (dL/dγ of that module, exactly). At the end the adapters stand where they stood.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, NamedTuple, cast, final

import torch
from torch import Tensor, nn

from .adapter import AbstractAdapter, AdditiveAdapter, Base
from .attach import Adapted, Replacement, adapters
from .errors import UsageError
from .fused import Parts
from .stack import StackAdapter
from .statistics import Statistics

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


@final
class Scaled(AdditiveAdapter):
    """γ times the change of `own`. At γ = 1 it is `own` and at γ = 0 the frozen layer, bit for bit."""

    ROLES: ClassVar[Mapping[str, str]] = {}
    gamma: Tensor

    def __init__(self, own: AdditiveAdapter) -> None:
        super().__init__()
        self.own, self.config = own, own.config
        like = next(own.parameters())
        self.register_buffer("gamma", torch.ones((), device=like.device, dtype=like.dtype), persistent=False)
        self.train(own.training)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Do nothing: `own` has started."""

    def delta_weight(self) -> Tensor:
        """Give γ ΔW."""
        return self.gamma * self.own.delta_weight()

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give γ times the change of the output."""
        change = self.own.delta(x, base)
        return change * self.gamma.to(change.dtype)


class Spot(NamedTuple):
    """Where an adapter stands: `holder[key]`, the layer's own place for it or that of a part."""

    path: str
    layer: Adapted
    holder: nn.ModuleDict | nn.ModuleList
    key: str
    adapter: AbstractAdapter


def spots(model: nn.Module, name: str) -> Iterator[Spot]:
    """Give the adapters of `name` one by one, those of the parts of fused layers and of stacks each for itself."""
    for path, layer, adapter in adapters(model, name):
        if not isinstance(adapter, Replacement):
            yield from _inside(Spot(path, layer, layer.adapters, name, adapter))


def _inside(spot: Spot) -> Iterator[Spot]:
    adapter = spot.adapter
    if isinstance(adapter, Parts):
        for part, own in adapter.each():
            yield from _inside(Spot(f"{spot.path}.{part}", spot.layer, adapter.parts, part, own))
    elif isinstance(adapter, StackAdapter):
        for i, own in enumerate(adapter.each()):
            yield from _inside(Spot(f"{spot.path}.parts.{i}", spot.layer, adapter.parts, str(i), own))
    else:
        yield spot


@contextmanager
def scalable(model: nn.Module, name: str) -> Generator[dict[str, Scaled]]:
    """Put a `Scaled` before every adapter of `name` and give them by path, all at γ = 1.

    Raises UsageError for a method whose change cannot be scaled. Modules trained in full (`modules_to_save`) stay as they are.
    """
    found = list(spots(model, name))
    _require_additive(found)
    placed = [(spot, Scaled(cast(AdditiveAdapter, spot.adapter))) for spot in found]
    try:
        for spot, scaled in placed:
            _put(spot, scaled)
        yield {spot.path: scaled for spot, scaled in placed}
    finally:
        for spot, _ in placed:
            _put(spot, spot.adapter)


def set_strength(strengths: Mapping[str, Scaled], gamma: float) -> None:
    """Set γ of every module."""
    for scaled in strengths.values():
        scaled.gamma.fill_(gamma)


@contextmanager
def leaves(strengths: Mapping[str, Scaled]) -> Generator[list[Tensor]]:
    """Make γ of every module a leaf of the graph, 1, and give them in the order of `strengths`."""
    before = [scaled.gamma for scaled in strengths.values()]
    fresh = [torch.ones_like(gamma, requires_grad=True) for gamma in before]
    try:
        for scaled, leaf in zip(strengths.values(), fresh, strict=True):
            scaled.gamma = leaf
        yield fresh
    finally:
        for scaled, gamma in zip(strengths.values(), before, strict=True):
            scaled.gamma = gamma


def trained_in_full(model: nn.Module, name: str) -> list[str]:
    """Give the modules that γ does not reach."""
    return [path for path, _, adapter in adapters(model, name) if isinstance(adapter, Replacement)]


def slopes(value: Tensor, gammas: list[Tensor], others: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """Give dL/dγ of each module (modules,) and the gradients by other tensors; 0 and None where the loss does not reach."""
    found = torch.autograd.grad(value, [*gammas, *others], allow_unused=True)
    own = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(gammas, found, strict=False)]
    return torch.stack(own), list(found[len(gammas) :])


def scales(model: nn.Module, name: str) -> bool:
    """Whether every adapter of `name` can be put at another strength."""
    found = list(spots(model, name))
    return bool(found) and all(isinstance(spot.adapter, AdditiveAdapter) for spot in found)


def _require_additive(found: list[Spot]) -> None:
    if not found:
        raise UsageError(
            "the adapter holds only modules trained in full", why="there is no change of a matrix to scale"
        )
    other = [spot for spot in found if not isinstance(spot.adapter, AdditiveAdapter)]
    if other:
        kinds = sorted({type(spot.adapter).__name__.removesuffix("Adapter") for spot in other})
        raise UsageError(
            f"{', '.join(kinds)} has no strength: its change is not one that is added to the weight",
            why=f"γ would scale ΔW in W + ΔW; at {other[0].path} the adapted layer is another function of W or of the input",
            fix="measure it at the strength it has: lorakit eval",
        )


def _put(spot: Spot, module: nn.Module) -> None:
    if isinstance(spot.holder, nn.ModuleDict):
        spot.holder[spot.key] = module
    else:
        spot.holder[int(spot.key)] = module
