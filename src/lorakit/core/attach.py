"""Put adapters on the layers of any model, switch between them, take them off.

`attach` changes the class of a layer in place, the way `torch.nn.utils.parametrize` and FSDP2's `fully_shard` do. The base
keeps its identity and its state-dict keys: `q_proj.weight` stays `q_proj.weight`, so checkpoints, weight tying, tensor-parallel
plans and `isinstance(m, nn.Linear)` need no special case. Adapters live beside it, at `q_proj.adapters.<name>`. The price: a
model with adapters cannot be pickled whole (its state dict can).
"""

import copy
import functools
import gc
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar, cast, final

import torch
from torch import Tensor, nn

from .adapter import AbstractAdapter, Base, Method, Resizable, Selective, Shape, Sharing
from .errors import UsageError
from .fused import Declared, Parts
from .kinds import Kind, kind, require_kind
from .statistics import Statistics
from .target import ALL_LINEAR, Site, Target, by_pattern, saved_modules, selection, sites
from .tokens import watchers

P = ParamSpec("P")
T = TypeVar("T")


class Adapted(nn.Module):
    """Mixin in front of a layer's kind and its own class: it holds named adapters, at most one active, and is their `Base`."""

    changes: ClassVar[int] = 0
    """Layers that were ever adapted or given back: whether a list of a model's adapted layers is still right."""

    adapters: nn.ModuleDict
    active: str | None
    merged: tuple[str, dict[str, nn.Parameter] | None] | None
    """(adapter, the weights from before or None if they were not kept), while an adapter is folded into this layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active adapter, or the layer as it was."""
        if self.active is None:
            return self.frozen(*args, **kwargs)
        return self.adapters[self.active](*args, self, **kwargs)

    def frozen(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer as it was."""
        return super().forward(*args, **kwargs)

    def linear(self, x: Tensor) -> Tensor:
        """Run the layer without its bias."""
        return cast(Kind, self).without_bias(self.frozen(x))


@final
class Replacement(nn.Module):
    """A copy of a module, trained in full (`modules_to_save`)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.copy = copy.deepcopy(module)
        if isinstance(self.copy, Adapted):  # what other adapters are there is not theirs to copy
            detach(self.copy)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy; the module it replaces comes last and is not needed."""
        return self.copy(*args[:-1], **kwargs)

    def roles(self) -> dict[str, str]:
        """Every parameter is a weight trained in full."""
        return {name: "base" for name, _ in self.named_parameters()}


Attached = AbstractAdapter | Replacement


@functools.cache
def _adapted_class(cls: type[nn.Module], mixin: type[nn.Module] | None) -> type[nn.Module]:
    bases = (Adapted, cls) if mixin is None else (Adapted, mixin, cls)
    return type(f"Adapted{cls.__name__}", bases, {"__wrapped_class__": cls})


def wrapped_class(layer: nn.Module) -> type[nn.Module]:
    """Give the layer's own class."""
    return vars(type(layer))["__wrapped_class__"] if isinstance(layer, Adapted) else type(layer)


def _adapt(layer: nn.Module) -> Adapted:
    if not isinstance(layer, Adapted):
        layer.__class__ = _adapted_class(type(layer), kind(layer))
        adapted = cast(Adapted, layer)
        adapted.adapters, adapted.active, adapted.merged = nn.ModuleDict(), None, None
    return cast(Adapted, layer)


def _without_collection(function: Callable[P, T]) -> Callable[P, T]:
    """Keep Python from looking for cycles while thousands of objects are made that all stay: a third of the time went to it."""

    @functools.wraps(function)
    def paused(*args: P.args, **kwargs: P.kwargs) -> T:
        was = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if was:
                gc.enable()

    return paused


@_without_collection
def attach(
    model: nn.Module,
    method: Method,
    *,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude_modules: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    last_n_layers: int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] | None = None,
    fused: Mapping[str, Declared] | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    name: str = "default",
) -> nn.Module:
    """Give the targeted layers of `model` an adapter `name`, activate it, and leave exactly it trainable.

    The other arguments are those of `Target`; `statistics` are measurements by layer path, for the starts that need
    them. Raises UsageError for a name in use, for targets that match nothing and for patterns and layers that the
    method cannot follow; the model is then unchanged.
    """
    target = Target(
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        layers=layers,
        last_n_layers=last_n_layers,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        modules_to_save=modules_to_save,
        fused=fused,
    )
    place(model, method, target, name)
    try:
        for path, layer, adapter in adapters(model, name):
            # A skeleton on the meta device holds nothing that could be looked at, and no values to start with.
            if isinstance(adapter, AbstractAdapter) and not cast(Kind, layer).weight.is_meta:
                adapter.start(cast(Base, layer), (statistics or {}).get(path))
    except BaseException as error:
        detach(model, name)
        if isinstance(error, UsageError):
            raise UsageError(error.what, why=error.why, fix=error.fix, where=error.where or f"layer {path}") from error
        raise
    use(model, name)
    return trainable(model, name)


class Place(NamedTuple):
    """A layer that is to carry an adapter, with the sites on it (one, or the targeted parts of a fused layer)."""

    path: str
    layer: nn.Module
    sites: list[Site]
    methods: list[Method]

    def build(self) -> AbstractAdapter:
        """Build the adapter, parameters not filled, on the default device."""
        if self.sites[0].rows is None:
            return self.methods[0].build(_shape(self.sites[0]))
        rows = {str(s.part): s.rows for s in self.sites if s.rows is not None}
        made = {str(s.part): method.build(_shape(s)) for s, method in zip(self.sites, self.methods, strict=True)}
        return Parts(made, rows, _shape(Site(self.path, self.layer)).out_features)


def places(model: nn.Module, method: Method, target: Target) -> list[Place]:
    """Give the layers that `target` names with the method each is to get: rank and alpha by the patterns, or its own way."""
    chosen = sites(model, target)
    names = [s.name for s in chosen]
    ranks = by_pattern(target.rank_pattern, names, "rank_pattern", model)
    alphas = by_pattern(target.alpha_pattern, names, "alpha_pattern", model)
    check_patterns(method, bool(ranks), bool(alphas))
    selected = _selected(model, method, chosen)
    if isinstance(method, Sharing):
        method = method.shared([_shape(s) for s in chosen])
    selective = isinstance(method, Selective)
    found: dict[str, Place] = {}
    for site in chosen:
        own = method
        if site.name in ranks or site.name in alphas:
            sized = cast(Resizable, method)
            alpha = alphas.get(site.name, vars(method).get("alpha"))
            own = cast(Method, sized.at(ranks.get(site.name, sized.r), alpha))
        if selective:
            own = cast(Selective, own).on(site.name, None if selected is None else site.name in selected)
        place = found.setdefault(site.path, Place(site.path, site.layer, [], []))
        place.sites.append(site)
        place.methods.append(own)
    return list(found.values())


def check_patterns(method: Method, ranks: bool, alphas: bool) -> None:
    """Raise UsageError for patterns of what the method does not have."""
    sized = isinstance(method, Resizable)
    lacking = ["rank"] if ranks and not sized else []
    lacking += ["alpha"] if alphas and not (sized and "alpha" in vars(method)) else []
    if lacking:
        patterns = " and ".join(f"{what}_pattern" for what in lacking)
        raise UsageError(f"{type(method).__name__} has no {' and no '.join(lacking)} of a layer, so no {patterns}")


def _selected(model: nn.Module, method: Method, chosen: list[Site]) -> set[str] | None:
    """Give the places that a `Selective` method's own field names; None if it leaves that to the method."""
    wanted = vars(method)[method.SELECTS] if isinstance(method, Selective) else None
    return None if wanted is None else selection(chosen, wanted, cast(Selective, method).SELECTS, model)


def _shape(site: Site) -> Shape:
    whole = require_kind(site.path, site.layer).shape(cast(Kind, site.layer))
    return whole if site.rows is None else whole._replace(out_features=len(site.rows))


@_without_collection
def place(model: nn.Module, method: Method, target: Target, name: str) -> None:
    """Build adapter `name` on the targeted layers, not started, not active. Nothing changes if anything is wrong."""
    check_name(model, name)
    built = _build(model, method, target)
    Adapted.changes += 1
    for layer, adapter in built:
        _adapt(layer).adapters[name] = adapter.train(layer.training)
        for watcher in watchers(adapter):
            watcher.watch(model)


def _build(model: nn.Module, method: Method, target: Target) -> list[tuple[nn.Module, nn.Module]]:
    """Give each targeted layer with its adapter. Raises UsageError with all layers that the method refuses."""
    built: list[tuple[nn.Module, nn.Module]] = []
    refused: list[tuple[str, UsageError]] = []
    for spot in places(model, method, target):
        weight = cast(Kind, spot.layer).weight
        # fp32 parameters also on a bf16 or quantized base: AdamW's small steps would be lost in bf16. fp64 stays fp64.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        try:
            made = spot.build()
            here = weight.device.type == "cpu" and dtype == torch.get_default_dtype()  # it is already, as it was built
            built.append((spot.layer, made if here else made.to(weight.device, dtype)))
        except UsageError as error:
            refused.append((spot.path, error))
    if refused:
        first = refused[0][1]
        paths = [path for path, _ in refused]
        more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
        raise UsageError(first.what, why=first.why, fix=first.fix, where=f"layers {', '.join(paths[:8])}{more}")
    return built + [(module, Replacement(module)) for _, module in saved_modules(model, target)]


def check_name(model: nn.Module, name: str) -> None:
    """Raise UsageError for what cannot be the name of a new adapter on this model."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", name) or name in dir(nn.ModuleDict):
        raise UsageError(
            f"{name!r} is no name for an adapter", fix="letters, digits, _ and -, and not a method of ModuleDict"
        )
    if name in names(model):
        raise UsageError(
            f"there is an adapter {name!r} already", fix=f"detach(model, {name!r}) first, or take another name"
        )


def adapted(model: nn.Module) -> list[tuple[str, Adapted]]:
    """Give (path, layer) of every layer that carries an adapter, in the model's order.

    Looking through a model of thousands of modules takes long, so the list is remembered until a layer is adapted or given
    back anywhere.
    """
    known = vars(model).get("_adapted")
    if known is None or known[0] != Adapted.changes:
        found = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, Adapted)]
        known = vars(model)["_adapted"] = (Adapted.changes, found)
    return known[1]


def adapters(model: nn.Module, name: str = "default") -> Iterator[tuple[str, Adapted, Attached]]:
    """Yield (path, layer, adapter) for every layer that carries adapter `name`."""
    for path, layer in adapted(model):
        if name in layer.adapters:
            yield path, layer, cast(Attached, layer.adapters[name])


def names(model: nn.Module) -> list[str]:
    """Give the names of the resident adapters."""
    return list(dict.fromkeys(n for _, layer in adapted(model) for n in layer.adapters))


def active(model: nn.Module) -> str | None:
    """Give the name of the active adapter, or None."""
    return next((layer.active for _, layer in adapted(model) if layer.active is not None), None)


def require(model: nn.Module, name: str) -> None:
    """Raise UsageError unless adapter `name` is resident."""
    have = names(model)
    if name not in have:
        raise UsageError(f"no adapter {name!r} on this model", fix=f"resident: {', '.join(have) or 'none'}")


def use(model: nn.Module, name: str | None) -> nn.Module:
    """Make adapter `name` the active one, or none. What is trainable does not change (`trainable` does that)."""
    chosen = [(layer, name is not None and name in layer.adapters) for _, layer in adapted(model)]
    if name is not None and not any(carries for _, carries in chosen):
        require(model, name)
    for layer, carries in chosen:
        object.__setattr__(
            layer, "active", name if carries else None
        )  # it is no module, and theirs takes ten times as long
    return model


@contextmanager
def disabled(model: nn.Module) -> Generator[nn.Module]:
    """Run the base model as it was, inside `with disabled(model):`."""
    before = [(layer, layer.active) for _, layer in adapted(model)]
    for layer, _ in before:
        layer.active = None
    try:
        yield model
    finally:
        for layer, was in before:
            layer.active = was


def trainable(model: nn.Module, name: str | None) -> nn.Module:
    """Freeze everything except adapter `name` (everything if None)."""
    model.requires_grad_(False)
    if name is not None:
        require(model, name)
        for _, _, adapter in adapters(model, name):
            roles = adapter.roles()
            for key, p in adapter.named_parameters():
                p.requires_grad_(roles[key] != "frozen")
    return model


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove adapter `name` (every adapter if None); layers left without one get their own class back."""
    if name is not None:
        require(model, name)
    for _, layer in adapted(model):
        for gone in [name] if name is not None else list(layer.adapters):
            if gone in layer.adapters:
                for watcher in watchers(layer.adapters[gone]):
                    watcher.unwatch()
                del layer.adapters[gone]
            if layer.active == gone:
                layer.active = None
        if not layer.adapters:
            del layer.adapters, layer.active, layer.merged
            layer.__class__ = wrapped_class(layer)
    Adapted.changes += 1
    return model
