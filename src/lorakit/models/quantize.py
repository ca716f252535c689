"""Store a model's linear layers in 4 or 8 bits, and what that costs and saves.

This is the one place where a base weight changes. For LoftQ it is also where it changes on purpose: the stored weight becomes
quant(W - s·B·A), and what is left of W goes to the adapter's start (`init/loftq.py`) as a statistic of the layer.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..bases import maker
from ..core.adapter import Method, Ranked
from ..core.attach import names, places
from ..core.errors import UsageError
from ..core.kinds import Conv1DKind, Kind, kind
from ..core.start import needs
from ..core.statistics import Statistics
from ..core.target import ALL_LINEAR, Target, sites
from ..core.weight import bytes_of, dense, learn, store
from ..init.loftq import alternate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def quantize(
    model: nn.Module, name: str, method: Method | None = None, *, iterations: int = 1, **target: Any
) -> dict[str, Statistics]:
    """Store every linear layer but the output head and `modules_to_save` in the format `name`: "nf4", "fp4" or "int8".

    Give `method` and `target` (the arguments of `attach`) if the adapter's start repairs what is lost (LoftQ): the residuals
    that are returned, by layer path, are `attach`'s `statistics`. `iterations`: LoftQ's alternations, 1 to 5. With more than
    one the base is no longer the ordinary quantized model, so it has to be saved with the adapter. Biases, embeddings and
    norms stay as they are. Raises UsageError for a missing package, adapters on the model, and dtypes other than 16 and 32 bits.
    """
    if names(model):
        raise UsageError("a model with adapters cannot be quantized", fix="quantize it first, then attach")
    if not 1 <= iterations <= 5:
        raise UsageError(f"iterations must be from 1 to 5, not {iterations}")
    make = maker(name)
    layers = dict(linear_layers(model, target.get("modules_to_save")))
    ranks = _ranks(model, method, target)
    _check(layers, ranks.keys(), name)
    lost = {}
    while layers:
        path, layer = layers.popitem()  # the float weight is let go as soon as its stored form is in place
        plain = _as_linear(layer)
        made = make(plain)
        if path in ranks:
            W = plain.weight.detach().float()
            if iterations > 1:  # the first one is what `make` did
                made.weight = cast(nn.Parameter, alternate(W, partial(store, made.weight), ranks[path], iterations))
            lost[path] = Statistics(residual=W - dense(made.weight).float())
        _swap(model, layer, made)
    return lost


def _check(layers: Mapping[str, nn.Module], repaired: Collection[str], name: str) -> None:
    """Raise UsageError, before anything is changed, for what cannot be stored in the format `name`."""
    for path, layer in layers.items():
        if layer.weight.dtype not in DTYPES:
            raise UsageError(f"{path}: a weight in {layer.weight.dtype} cannot be quantized", fix="load it in float32")
    missing = sorted(set(repaired) - layers.keys())
    if missing:
        raise UsageError(
            f"{missing[0]} is not stored in {name}, so there is nothing for its adapter to repair",
            fix="target linear layers other than the output head, or take another init",
        )


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Make every quantized layer a plain linear layer again, holding what was stored; no adapters may be attached."""
    for layer in list(model.modules()):
        weight = layer._parameters.get("weight")
        learn(type(weight))
        if isinstance(layer, nn.Linear) and weight is not None and type(weight) is not nn.Parameter:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(cast(Any, kind(layer)).matrix(layer), requires_grad=False)
            plain.bias = layer.bias
            _swap(model, layer, plain)
    return model


def stored_bytes(model: nn.Module) -> int:
    """Give the bytes of all weights and buffers as they are stored, scales included; a tied weight counts once."""
    for weight in model.parameters():
        learn(type(weight))
    return sum({id(t): bytes_of(t) for t in [*model.parameters(), *model.buffers()]}.values())


def saved_bytes(model: nn.Module, name: str, modules_to_save: list[str] | None = None) -> int:
    """Give the bytes that `quantize` would save on a model that may be a skeleton without data."""
    layers = linear_layers(model, modules_to_save)
    weights = [cast(Tensor, layer.weight) for _, layer in layers]
    return sum(weight.nbytes - bytes_when_stored(weight.shape, name) for weight in weights)


def bytes_when_stored(shape: torch.Size, name: str) -> int:
    """Give the bytes of a weight of this shape in a format: values, scales, and the tables that each layer has of its own."""
    if name == "int8":
        return shape.numel() + 4 * shape[0]
    blocks = math.ceil(shape.numel() / 64)
    levels, scale_levels, offset = 4 * 16, 4 * 256, 4
    return math.ceil(shape.numel() / 2) + blocks + 4 * math.ceil(blocks / 256) + levels + scale_levels + offset


def linear_layers(model: nn.Module, modules_to_save: list[str] | None) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, layer) of the float linear layers that are quantized: all but the head and what is trained in full."""
    for site in sites(model, Target(target_modules=ALL_LINEAR, modules_to_save=modules_to_save)):
        if type(site.layer._parameters["weight"]) is nn.Parameter:
            yield site.path, site.layer


def _ranks(model: nn.Module, method: Method | None, target: dict[str, Any]) -> dict[str, int]:
    """Give path -> rank of the layers whose adapters start from what quantization lost; a fused layer has its parts' sum."""
    if method is None or "residual" not in needs(method):
        return {}
    spots = places(model, method, Target(**target))
    return {spot.path: sum(cast(Ranked, own).r for own in spot.methods) for spot in spots}


def _as_linear(layer: nn.Module) -> nn.Linear:
    """Give a layer that multiplies by one matrix (Linear, GPT-2's Conv1D) as an `nn.Linear` of the same tensors."""
    if isinstance(layer, nn.Linear):
        return layer
    mixin = cast(type[Kind], kind(layer))
    if not issubclass(mixin, Conv1DKind):
        raise UsageError(f"a {type(layer).__name__} cannot be quantized")
    matrix = mixin.matrix(cast(Conv1DKind, layer)).contiguous()
    plain = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(matrix, requires_grad=False)
    plain.bias = cast(nn.Parameter, layer.bias)
    return plain


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model holds `old`."""
    new.train(old.training)
    for parent in model.modules():
        for leaf, child in parent._modules.items():
            if child is old:
                parent._modules[leaf] = new
