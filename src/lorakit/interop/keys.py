"""Names and shapes of an adapter's tensors in the file, for every layer kind.

    Linear, Conv1D   <path>.lora_A.weight (r, in)             <path>.lora_B.weight (out, r)
    Embedding        <path>.lora_embedding_A (r, vocab)       <path>.lora_embedding_B (dim, r)
    Conv1d/2d/3d     <path>.lora_A.weight (r, in, *kernel)    <path>.lora_B.weight (out, r, 1, ...)
    other methods    their own names for such tensors, moved and shaped in the same way
    fused parts      the layer's own A and B: A stacked, B block by block (zero elsewhere)
    trained in full  <path>.<parameter>
    held in common   <name>, once, behind `base_model.` alone

All behind PEFT's prefix. A method that PEFT does not know keeps its own parameter names.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import singledispatch
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..core.adapter import AbstractAdapter
from ..core.attach import Adapted, Replacement
from ..core.chain import Chain
from ..core.fused import Parts
from .peft_config import peft_format

PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."  # of what all layers hold in common


@singledispatch
def _spell(layer: nn.Module, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    return name, tensor


@_spell.register
def _(layer: nn.Embedding, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    name = re.sub(r"^oft_R\b", "oft_embedding_R", name)
    return re.sub(r"^(?:(lora)_([AB])\.weight|(hira)_([AB]))$", r"\1\3_embedding_\2\4", name), tensor


@_spell.register
def _(layer: _ConvNd, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    inputs, *kernel = layer.weight.shape[1:]
    ones = [1] * len(kernel)
    shape = {
        "lora_A.weight": (len(tensor), inputs, *kernel),
        "lora_B.weight": (*tensor.shape, *ones),
        "lora_magnitude_vector": (1, len(tensor), *ones),
        "hira_A": (len(tensor), inputs, *kernel),
        "hira_B": (*tensor.shape, *ones),
        "lokr_w2": (len(tensor), -1, *kernel),
        "ia3_l": (1, tensor.numel(), *ones),
        "boft_s": (1, tensor.numel()),
    }
    return name, tensor.reshape(shape[name]) if name in shape else tensor


def file_tensors(path: str, layer: nn.Module, adapter: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give (key, tensor) of everything one layer's adapter saves, as it stands in the file."""
    if isinstance(adapter, Replacement):
        for name, tensor in adapter.copy.state_dict().items():
            yield f"{PREFIX}{path}.{name}", tensor
        return
    form = peft_format(cast(AbstractAdapter, adapter).config)
    if form and isinstance(adapter, Parts | Chain) and _plain(adapter):
        A, B, _ = pair(adapter)
        own = {"lora_A": A, "lora_B": B}
    else:
        own = adapter.state_dict()
    for name, tensor in own.items():
        if form and name in form.tensors:
            spelled, tensor = _spell(layer, form.tensors[name], tensor)
        else:
            spelled = name
        yield f"{PREFIX}{path}.{spelled}", tensor
    for name, tensor in cast(AbstractAdapter, adapter).shared_tensors().items():
        yield f"{SHARED_PREFIX}{name}", tensor


def fill(path: str, layer: Adapted, adapter: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter its tensors from the file's. Every key of `file_tensors` must be there, in its shape.

    What has the right dtype and device already is taken over and not copied: `tensors` must be nobody else's.
    """
    if isinstance(adapter, Replacement):
        adapter.copy.load_state_dict({n: tensors[f"{PREFIX}{path}.{n}"] for n in adapter.copy.state_dict()})
        return
    form = peft_format(cast(AbstractAdapter, adapter).config)
    if isinstance(adapter, Parts) and form and _plain(adapter):
        A, B = (tensors[f"{PREFIX}{path}.{form.tensors[name]}"] for name in ("lora_A", "lora_B"))
        _split(adapter, A, B)
        return
    for name, own in adapter.state_dict(keep_vars=True).items():
        spelled = _spell(layer, form.tensors[name], own)[0] if form and name in form.tensors else name
        _take(own, tensors[f"{PREFIX}{path}.{spelled}"].reshape(own.shape))
    for name, own in cast(AbstractAdapter, adapter).shared_tensors().items():
        own.copy_(tensors[f"{SHARED_PREFIX}{name}"])


def _take(own: Tensor, tensor: Tensor) -> None:
    if own.dtype == tensor.dtype and own.device == tensor.device:
        own.data = tensor
    else:
        with torch.no_grad():
            own.copy_(tensor)


def spelled_for_peft(adapter: AbstractAdapter) -> bool:
    """Whether PEFT has names for all tensors: not for the parts of a fused layer, unless one pair can hold them all."""
    return peft_format(adapter.config) is not None and (not isinstance(adapter, Parts) or _plain(adapter))


def _plain(adapter: nn.Module) -> bool:
    """Whether this is s·B·A and nothing else, however composed, so that one A and one B can hold it all."""
    if isinstance(adapter, Parts):
        return all(_plain(part) for part in adapter.parts.values())
    return isinstance(adapter, Chain) or set(adapter.state_dict()) == {"lora_A", "lora_B"}


def pair(adapter: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Give (A, B, s) of a composed adapter: links stacked, parts of a fused layer block by block at the first one's s."""
    if isinstance(adapter, Chain):
        A, B, scale = pair(adapter.live)
        return torch.cat([A, adapter.frozen_A.detach()]), torch.cat([B, adapter.frozen_B.detach()], dim=1), scale
    if not isinstance(adapter, Parts):
        plain = cast(Any, adapter)
        return plain.lora_A.detach(), plain.lora_B.detach(), plain.scale
    pairs = {name: pair(part) for name, part in adapter.parts.items()}
    A = torch.cat([A for A, _, _ in pairs.values()])
    scale = next(iter(pairs.values()))[2]
    B = A.new_zeros(adapter.out_features, len(A))
    column = 0
    for name, (own_A, own_B, own_scale) in pairs.items():
        B[adapter.rows(name), column : column + len(own_A)] = own_B * (own_scale / scale)
        column += len(own_A)
    return A, B, scale


def _split(adapter: Parts, A: Tensor, B: Tensor) -> None:
    """Undo `pair` for parts that are plain factors, as they are when they are loaded."""
    parts = {name: cast(Any, part) for name, part in adapter.parts.items()}
    first = next(iter(parts.values()))
    column = 0
    with torch.no_grad():
        for name, part in parts.items():
            r = part.lora_A.shape[0]
            part.lora_A.copy_(A[column : column + r])
            part.lora_B.copy_(B[adapter.rows(name), column : column + r] / (part.scale / first.scale))
            column += r


def config_in_file(adapter: AbstractAdapter) -> Any:
    """Give the configuration that one layer's tensors in the file have: the adapter's own, or that of the composed pair."""
    if not (isinstance(adapter, Parts | Chain) and peft_format(adapter.config) and _plain(adapter)):
        return adapter.config
    first = adapter if isinstance(adapter, Chain) else next(iter(adapter.parts.values()))
    config = cast(Any, first).config
    r = len(pair(adapter)[0])
    exponent = 0.5 if config.rank_stabilized else 1.0
    return replace(config.at(r, config.alpha * (r / config.r) ** exponent), init="kaiming")
