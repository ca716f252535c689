"""What a linear layer computes, adapter included, as data: for operations that run several layers at once."""

from typing import Any, cast

from torch import nn

from ..kernels.low_rank import Projection
from .adapter import AbstractAdapter, Base
from .attach import Adapted, wrapped_class
from .kinds import kind


def projection(layer: nn.Module) -> Projection | None:
    """Give y = gain (x W^T + s B A x) + b of a layer, or None if it is anything else at this moment.

    It is anything else with an adapter of another form, with a weight that is trained itself, with hooks, which want to see
    the layer run, and with a forward of its own.
    """
    mixin, own = kind(layer), cast(Any, layer)
    if mixin is None or not (mixin.PRODUCT or wrapped_class(layer).forward is nn.Linear.forward) or hooked(layer):
        return None
    if own.weight.requires_grad or (own.bias is not None and own.bias.requires_grad):
        return None
    matrix = mixin.reader(own)
    if not isinstance(layer, Adapted) or layer.active is None:
        return Projection(matrix, own.bias, None)
    adapter = layer.adapters[layer.active]
    if not isinstance(adapter, AbstractAdapter) or hooked(adapter):
        return None
    change = adapter.routed(cast(Base, layer))
    return None if change is None else Projection(matrix, own.bias, change)


def hooked(module: nn.Module) -> bool:
    """Whether anything wants to see the module run."""
    own = cast(Any, module)
    return bool(own._forward_hooks or own._forward_pre_hooks or own._backward_hooks or own._backward_pre_hooks)
