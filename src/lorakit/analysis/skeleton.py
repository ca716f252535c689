"""A model with the layers of an adapter's file and no weights: names from the file, shapes from the file or from the base."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core.adapter import Method, Shape
from ..core.errors import FileError, UsageError
from ..core.stack import PROBE, settings_of
from ..interop.adapter_directory import BASE_WEIGHT, CONFIG, SIDE, WEIGHTS
from ..interop.keys import PREFIX, file_tensors
from ..interop.peft_reading import read_config
from ..interop.read import TensorInfo, read_header, read_json, read_tensors, regular_file, shown, some

KIND = Literal["linear", "embedding", "conv", "expert"]


class Layer(NamedTuple):
    """What a layer of the base is: its kind, the shape of its matrix, and what the shape does not say.

    kernel: of a convolution (in, *sizes), of stacked experts the stored shape (experts, rows, columns).
    """

    kind: KIND
    shape: Shape
    kernel: tuple[int, ...] = ()


class Skeleton(NamedTuple):
    """A model without weights, and what its adapted layers are."""

    model: nn.Module
    layers: dict[str, Layer]
    notes: tuple[str, ...]


def skeleton(directory: Path, layer_of: Callable[[str], Layer] | None = None) -> Skeleton:
    """Give a model that the adapter in `directory` fits. `layer_of` (of the base) is asked where the file does not say it."""
    config = read_json(regular_file(directory, CONFIG))
    side = read_json(regular_file(directory, SIDE)) if (directory / SIDE).exists() else {}
    method, target = read_config(config, side)
    file = regular_file(directory, WEIGHTS)
    header = {k.removeprefix(PREFIX): v for k, v in read_header(file).items() if k.startswith(PREFIX)}
    copies = {k.removesuffix(BASE_WEIGHT) for k in header if k.endswith(BASE_WEIGHT)}
    saved, rest = _saved(header, target.modules_to_save or ())
    found: dict[str, Layer] = {}
    silent: list[str] = []
    for path, tensors in _by_layer(rest, _tensor_names(method)).items():
        layer = _in_file(tensors, side.get("fused", {}).get(path, {}))
        if layer_of is not None and (layer is None or not any(_in_peft(name) for name in tensors)):
            layer = layer_of(path)
        if layer is None:
            silent.append(path)
        else:
            found[path] = layer
    if silent:
        raise FileError(
            f"the adapter's file does not say the shapes of {some([shown(p) for p in silent], 3)}",
            why=f"method {settings_of(method)['name']} has no tensors from which they follow",
            fix="give the base model (--base MODEL)",
            where=str(file),
        )
    root = nn.Module()
    kept = read_tensors(file) if copies else {}
    for path, layer in found.items():
        weight = kept[f"{PREFIX}{path}{BASE_WEIGHT}"] if path in copies else None
        _put(root, path, _layer(layer, weight))
    for path, shapes in saved.items():
        _put(root, path, _holder(shapes))
    notes = (f"copies of base weights in the file: {len(copies)}",) if copies else ()
    return Skeleton(root, found, notes)


def _tensor_names(method: Method) -> list[str]:
    """Give every name a tensor of this method can have after a layer's path, longest first."""
    names: set[str] = set()
    with torch.device("meta"):
        for layer, shape in ((nn.Linear(8, 8), PROBE), (_embedding(8, 8), PROBE._replace(one_hot=True, bias=False))):
            try:
                adapter = method.build(shape)
            except UsageError:  # a kind of layer that the method refuses
                continue
            names |= {key.removeprefix(f"{PREFIX}x.") for key, _ in file_tensors("x", layer, adapter)}
            names |= set(adapter.state_dict())
    return sorted(names, key=len, reverse=True)


def _by_layer(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Give layer -> tensor -> shape. What is none of the method's tensors is left for loading to refuse."""
    alternatives = "|".join(map(re.escape, names))
    # `parts.<name>`: of a fused layer whose parts need tensors of their own. `live.`: of a chain that PEFT has no name for.
    ours = re.compile(rf"(?P<path>.+?)\.(?P<name>(?:parts\.[^.]+\.)?(?:live\.)?(?:{alternatives}|frozen_[AB]))")
    grouped: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, info in tensors.items():
        match = ours.fullmatch(key)
        if match:
            grouped.setdefault(match["path"], {})[match["name"]] = info.shape
    return grouped


def _in_peft(name: str) -> bool:
    """Whether a tensor's name says by itself what kind of layer it belongs to."""
    return "_embedding_" in name or name in ("lora_A.weight", "lora_B.weight")


def _in_file(tensors: Mapping[str, tuple[int, ...]], fused: Mapping[str, Any]) -> Layer | None:
    """Read kind and shape off the shapes of a layer's tensors, if they say them."""
    embedding = {name[-1]: shape for name, shape in tensors.items() if re.search("_embedding_[AB]$", name)}
    if len(embedding) == 2:
        vocabulary, dim = embedding["A"][1], embedding["B"][0]
        return Layer("embedding", Shape(dim, vocabulary, one_hot=True, bias=False))
    if "lora_A.weight" in tensors and "lora_B.weight" in tensors:
        (_, *inner), (out, *_) = tensors["lora_A.weight"], tensors["lora_B.weight"]
        kernel = tuple(inner) if len(inner) > 1 else ()
        return Layer("conv" if kernel else "linear", Shape(out, math.prod(inner), kernel=math.prod(kernel[1:])), kernel)
    bare = {re.sub(r"^parts\.[^.]+\.", "", name).removeprefix("live."): shape for name, shape in tensors.items()}
    match bare.get("lora_A") or bare.get("hada_w1_b"), bare.get("lora_B") or bare.get("hada_w1_a"), bare.get("change"):
        case (_, inner), (out, _), None:
            if any(name.startswith("parts.") for name in tensors):
                out = max((stop for spans in fused.values() for _, stop in spans), default=0)
            return Layer("linear", Shape(out, inner))
        case None, None, (out, inner):
            return Layer("linear", Shape(out, inner))
    return None


def _saved(
    header: Mapping[str, TensorInfo], names: Iterable[str]
) -> tuple[dict[str, dict[str, tuple[int, ...]]], dict[str, TensorInfo]]:
    """Give the modules trained in full, path -> parameter -> shape, and the tensors that are in none of them."""
    entry = "|".join(map(re.escape, names))
    inside = re.compile(rf"(?P<path>(?:.*\.)?(?:{entry}))\.(?P<name>.+)") if entry else None
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    rest: dict[str, TensorInfo] = {}
    for key, info in header.items():
        match = inside.fullmatch(key) if inside else None
        if match:
            found.setdefault(match["path"], {})[match["name"]] = info.shape
        elif not key.endswith(BASE_WEIGHT):
            rest[key] = info
    return found, rest


def _layer(layer: Layer, weight: Tensor | None) -> nn.Module:
    """Make a layer whose weight takes no memory: one zero, seen as a whole matrix."""
    out, inner = layer.shape.out_features, layer.shape.in_features
    with torch.device("meta"):
        if layer.kind == "embedding":
            made: nn.Module = _embedding(inner, out)
        elif layer.kind == "conv":
            convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(layer.kernel) - 2]
            made = convolution(layer.kernel[0], out, layer.kernel[1:], bias=layer.shape.bias)
        else:
            made = nn.Linear(inner, out, bias=layer.shape.bias)
    for name, parameter in list(made.named_parameters()):
        value = torch.zeros(()).expand(parameter.shape)
        if name == "weight" and weight is not None:
            value = weight
        made.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return made


def _embedding(count: int, dim: int) -> nn.Embedding:
    """Make an embedding with given values: drawing them on the meta device would load torch's compiler, which takes seconds."""
    return nn.Embedding(count, dim, _weight=torch.zeros(()).expand(count, dim))


def _holder(tensors: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Make a module with parameters of these names and shapes, for one that was trained in full."""
    root = nn.Module()
    for name, shape in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = root
        for part in owner.split(".") if owner else ():
            module = _child(module, part)
        module.register_parameter(leaf, nn.Parameter(torch.zeros(()).expand(shape).clone(), requires_grad=False))
    return root


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    names = path.split(".")
    for name, following in pairwise(names):
        root = _child(root, name, nn.ModuleList if following.isdigit() else nn.Module)
    if names[-1] in root._modules:
        raise FileError(f"the adapter's file names {shown(path)} as a layer and as a part of one")
    root.add_module(names[-1], module)


def _child(module: nn.Module, name: str, cls: type[nn.Module] = nn.Module) -> nn.Module:
    """Give or make a child. Blocks stand in a list, which is where `layers_to_transform` looks for them."""
    if name not in module._modules:
        module.add_module(name, cls())
    return module.get_submodule(name)
