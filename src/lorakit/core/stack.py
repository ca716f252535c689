"""Several methods on the same layers as one adapter: each changes the layer that those before it have changed.

    W' = merge_n(... merge_2(merge_1(W)))        y = adapter_n(x, the layer with adapters 1 ... n-1)

To the second adapter the layer with the first is its `Base` (`_Changed`), so methods compose without knowing of each
other. What changes a weight comes first, what is a function of more than the weight (a bottleneck, a router) after it:
behind such a function there is no matrix that the next method could look at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn

from .adapter import AbstractAdapter, Base, Method, Selective, Shape, Sharing
from .errors import UsageError
from .registry import INITS, METHODS
from .settings import checked
from .statistics import Statistics

PROBE = Shape(1024, 1024)
"""A layer without data, on which a part is built to see whether it can be merged."""


@dataclass(frozen=True)
class Stack:
    """Several methods on the same layers; `Stack([LoRA(r=8), Houlsby()])`.

    parts: the methods in the order in which they act, as objects or each as a mapping of its name and settings
    """

    parts: Sequence[Any] = ({"name": "lora", "r": 8}, {"name": "houlsby", "bottleneck": 16})

    def __post_init__(self) -> None:
        parts = tuple(_method(part) for part in self.parts)
        if len(parts) < 2:
            raise UsageError(f"a stack needs at least two methods, not {len(parts)}", fix="name the one as the method")
        _check(cast(Any, parts))  # every method is a frozen dataclass, and so hashable
        object.__setattr__(self, "parts", parts)

    def shared(self, shapes: Sequence[Shape]) -> "SharedStack":
        """Give the method for layers of these shapes; a part whose layers share tensors sees them all."""
        return SharedStack(tuple(p.shared(shapes) if isinstance(p, Sharing) else p for p in self.parts))

    def build(self, shape: Shape) -> "StackAdapter":
        """Make the adapter of a single layer."""
        return self.shared([shape]).build(shape)


@final
@dataclass(frozen=True)
class SharedStack:
    """A stack for the layers of one attachment."""

    parts: tuple[Method, ...]

    def build(self, shape: Shape) -> "StackAdapter":
        """Make the adapter of one layer. Raises UsageError if one of the methods refuses it."""
        return StackAdapter([part.build(shape) for part in self.parts], shape)


def parts_of(method: Method) -> tuple[Method, ...]:
    """Give the methods that a method is made of: those of a stack, or itself."""
    return tuple(method.parts) if isinstance(method, Stack) else (method,)


def settings_of(method: Method) -> dict[str, Any]:
    """Give a method as plain values, its name and its settings; those of a stack's parts likewise."""
    own: Any = method  # every method is a dataclass
    settings = {"parts": [settings_of(part) for part in method.parts]} if isinstance(method, Stack) else asdict(own)
    return {"name": METHODS.name_of(type(method)), **settings}


def _method(part: Any) -> Method:
    """Give a part as a method object. Raises UsageError for a mapping that is none."""
    if not isinstance(part, Mapping):
        if not isinstance(part, Method) or isinstance(part, type):
            raise UsageError(f"{part!r:.100} is no method", fix="give objects such as LoRA(r=8), or {name: lora, r: 8}")
        return part
    name = part.get("name")
    if not isinstance(name, str):
        raise UsageError("a part of a stack needs a name", fix=f"one of: {', '.join(sorted(METHODS))}")
    return checked(METHODS[name], {key: value for key, value in part.items() if key != "name"}, name)


@cache
def _check(parts: tuple[Method, ...]) -> None:
    """Raise UsageError with the reason for methods that cannot be stacked, or not in this order."""
    for part in parts:
        reason = _refuses(part)
        if reason is not None:
            raise UsageError(f"{type(part).__name__} cannot be part of a stack", why=reason, fix="attach it alone")
    nonlinear = None
    for part in parts:
        if not _mergeable(part):
            nonlinear = nonlinear or part
        elif nonlinear is not None:
            raise UsageError(
                f"{type(part).__name__} cannot come after {type(nonlinear).__name__}",
                why="it changes the layer's matrix, and behind what cannot be merged there is none",
                fix=f"put {type(nonlinear).__name__} behind it",
            )


def _refuses(part: Method) -> str | None:
    if isinstance(part, Stack):
        return "it is a stack itself: list its parts"
    if isinstance(part, Selective):
        return f"its {part.SELECTS} names layers, and a stack is the same on all of them"
    if vars(type(part)).get("NEEDS"):
        return "it starts from other adapters"
    init = vars(INITS.module(vars(part)["init"])) if "init" in vars(part) else {}
    if "ranks" in init or "residual" in init.get("NEEDS", ()):
        return f"init {vars(part)['init']!r} goes by the one rank of a layer, of which a stack has several"
    return None


def _mergeable(part: Method) -> bool:
    with torch.device("meta"):
        try:
            return part.build(PROBE).mergeable()
        except UsageError:  # it will say so of the layers themselves
            return True


@final
class StackAdapter(AbstractAdapter):
    """The adapters of one layer, in the order in which they act.

    Each keeps its shape for ever: what AdaLoRA prunes is saved as zeros, for a stack has no rank of a layer to save.
    """

    ROLES: ClassVar[Mapping[str, str]] = {}

    def __init__(self, parts: Sequence[AbstractAdapter], shape: Shape) -> None:
        super().__init__()
        self.parts, self.shape = nn.ModuleList(parts), shape
        self.config = Stack(tuple(part.config for part in parts))

    def each(self) -> list[AbstractAdapter]:
        """Give the parts."""
        return [cast(AbstractAdapter, part) for part in self.parts]

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start each part on what those before it have made of the layer."""
        for part in self.each():
            part.start(base, statistics)
            base = _Changed(base, part, self.shape)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Run the layer through all parts."""
        for part in self.each():
            base = _Changed(base, part, self.shape)
        return base.frozen(x)

    def merge(self, weight: Tensor) -> Tensor:
        """Merge each part into what those before it have given. Raises UsageError if one cannot be merged."""
        for part in self.each():
            weight = part.merge(weight)
        return weight

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        """Merge each part into what those before it have given."""
        for part in self.each():
            bias = part.merge_bias(bias)
        return bias

    def mergeable(self) -> bool:
        """Whether every part is."""
        return all(part.mergeable() for part in self.each())

    def shared_tensors(self) -> dict[str, Tensor]:
        """Give what the layers of each part share."""
        own = {i: part.shared_tensors() for i, part in enumerate(self.each())}
        return {f"parts.{i}.{name}": tensor for i, tensors in own.items() for name, tensor in tensors.items()}

    def roles(self) -> dict[str, str]:
        """Give the parts' roles."""
        own = {i: part.roles() for i, part in enumerate(self.each())}
        return {f"parts.{i}.{name}": role for i, roles in own.items() for name, role in roles.items()}


class _Changed:
    """A layer with an adapter, seen as a layer of its own (`Base`)."""

    def __init__(self, base: Base, adapter: AbstractAdapter, shape: Shape) -> None:
        self.base, self.adapter, self.shape, self.VECTORS = base, adapter, shape, base.VECTORS

    def frozen(self, x: Tensor) -> Tensor:
        return self.adapter(x, self.base)

    def linear(self, x: Tensor) -> Tensor:
        return self.without_bias(self.frozen(x))

    def plus_bias(self, y: Tensor) -> Tensor:
        bias = self._bias()
        return y if bias is None else y + self.channels(bias).to(y.dtype)

    def without_bias(self, y: Tensor) -> Tensor:
        bias = self._bias()
        return y if bias is None else y - self.channels(bias).to(y.dtype)

    def _bias(self) -> Tensor | None:
        """Give the bias (out,) that the adapters so far have made of the layer's."""
        if isinstance(self.base, _Changed):
            return self.adapter.merge_bias(self.base._bias())
        if not self.shape.bias:
            return self.adapter.merge_bias(None)
        zero = next(self.adapter.parameters()).new_zeros(self.shape.out_features)
        return self.adapter.merge_bias(self.base.plus_bias(self.base.channels(zero)).flatten())

    def matrix(self) -> Tensor:
        return self.adapter.merge(self.base.matrix())

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.base.project(x, matrix)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return self.base.mix(h, matrix)

    def channels(self, v: Tensor) -> Tensor:
        return self.base.channels(v)

    def input_channels(self, v: Tensor) -> Tensor:
        return self.base.input_channels(v)
