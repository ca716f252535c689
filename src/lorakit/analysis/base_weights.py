"""The weights of a base model, matrix by matrix from its safetensors files, without building the model.

A layer is found by its name in the adapter; prefixes may differ (`model.`, `language_model.`), tied heads are the embedding,
and weights stored in 4 or 8 bits are read back into float. A format that is not known is refused.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.adapter import Shape
from ..core.errors import FileError
from ..core.registry import BASES
from ..core.weight import dense
from ..models.directory import Tensor as Declared
from ..models.directory import read_json, tensors
from .loaded import LoadedModule
from .skeleton import Layer

STORED_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""Model types whose linear layers are transformers' Conv1D, weight (in, out)."""
EMBEDDINGS = re.compile(r"(?:.*\.)?(embed_tokens|embed_in|wte|wpe|word_embeddings|position_embeddings|embed_positions)")
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
BLOCK = 128
"""Side of the blocks that share a scale in FP8 checkpoints; the last ones may be smaller."""
FOUR_BIT = ".quant_state.bitsandbytes__"


class BaseWeights:
    """A resolved model directory. Nothing but headers is read before a matrix is asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_json(directory / "config.json")
        self.declared = tensors(directory)
        self._paths = {key.removesuffix(".weight"): key for key in self.declared if key.endswith(".weight")}
        self._paths |= {key: key for key, info in self.declared.items() if len(info.shape) == 3}  # stacked experts
        self._transposed = _text_config(self.config).get("model_type") in STORED_TRANSPOSED

    def layer(self, path: str) -> Layer:
        """Give kind and shape of the layer at `path`. Raises FileError if there is none, or it holds no matrix."""
        key = self.key(path)
        shape = shape_of(key, self.declared, self._read)
        bias = key.removesuffix("weight") + "bias" in self.declared
        if len(shape) == 3 and not key.endswith(".weight"):
            return Layer("expert", Shape(shape[1], shape[2], bias=False), tuple(shape))
        if len(shape) > 2:
            size = torch.Size(shape[1:]).numel()
            return Layer("conv", Shape(shape[0], size, bias=bias, kernel=size // shape[1]), tuple(shape[1:]))
        if len(shape) < 2:
            raise FileError(f"{key} of the base model is no matrix", where=str(self.directory))
        if self._is_embedding(path):
            return Layer("embedding", Shape(shape[1], shape[0], one_hot=True, bias=False))
        out, inner = reversed(shape) if self._transposed else shape
        return Layer("linear", Shape(out, inner, bias=bias))

    def key(self, path: str) -> str:
        """Give the name in the files of the weight of the layer at `path`. Raises FileError if none or several could be it."""
        if path in self._paths:
            return self._paths[path]
        found = _nearest(path, self._paths)
        if not found and path.rpartition(".")[2] in ("lm_head", "embed_out"):
            found = [
                p for p in self._paths if EMBEDDINGS.fullmatch(p) and "position" not in p and not p.endswith("wpe")
            ]
        if len(found) != 1:
            why = (
                f"it could be {', '.join(found[:3])}"
                if found
                else f"its weights are named like {next(iter(self._paths))!r}"
            )
            raise FileError(
                f"the base model has no weight for {path!r}",
                why=why,
                fix="give the base model that the adapter was trained on",
                where=str(self.directory),
            )
        return self._paths[found[0]]

    def tensor(self, key: str) -> Tensor:
        """Give a stored tensor by its name in the files, in its own shape, as floats."""
        return stored_weight(key, self.declared, self._read, self.config)

    def matrix(self, module: LoadedModule) -> Tensor:
        """Give W (out, in) of a module, as the layer applies it, in a float dtype; of a part of a fused layer its rows."""
        return next(weight for _, weight in self.stream([module]))

    def stream(self, modules: Iterable[LoadedModule]) -> Iterator[tuple[LoadedModule, Tensor]]:
        """Yield (module, W) in the order of the files, one matrix in memory at a time."""
        located = [(self.key(module.layer), module) for module in modules]
        located.sort(key=lambda pair: (str(self.declared[pair[0]].file), self.declared[pair[0]].start))
        with ExitStack() as stack:
            files: dict[Path, Any] = {}

            def opened(name: str) -> Any:
                file = self.declared[name].file
                if file not in files:
                    files[file] = stack.enter_context(safe_open(str(file), "pt"))
                return files[file]

            for key, module in located:
                if module.expert is None:
                    yield module, self._matrix(key, module, lambda name: opened(name).get_tensor(name))
                else:
                    yield module, self._expert(key, module, opened(key))

    def _expert(self, key: str, module: LoadedModule, file: Any) -> Tensor:
        """Read one expert's matrix out of the stack."""
        if self.declared[key].dtype not in FLOATS:
            raise FileError(f"{key} is stored as {self.declared[key].dtype}, which is not read for experts")
        index, transposed = module.expert or (0, False)
        weight = file.get_slice(key)[index]
        return weight.T if transposed else weight

    def _matrix(self, key: str, module: LoadedModule, read: Callable[[str], Tensor]) -> Tensor:
        weight = stored_weight(key, self.declared, read, self.config).flatten(1)
        stored = list(weight.shape)
        if module.kind == "embedding" or (module.kind == "linear" and self._transposed and not self._is_embedding(key)):
            weight = weight.T
        if module.rows is not None:
            weight = weight[module.rows] if int(module.rows.max()) < len(weight) else weight[:0]
        if tuple(weight.shape) != module.shape:
            raise FileError(
                f"{module.path} changes a matrix {list(module.shape)}, the base model's is stored as {stored}",
                fix="give the base model that the adapter was trained on",
                where=str(self.directory),
            )
        return weight

    def _read(self, name: str) -> Tensor:
        with safe_open(str(self.declared[name].file), "pt") as file:
            return file.get_tensor(name)

    def _is_embedding(self, path: str) -> bool:
        return EMBEDDINGS.fullmatch(path.removesuffix(".weight")) is not None


def stored_weight(
    key: str, declared: Mapping[str, Declared], read: Callable[[str], Tensor], config: Mapping[str, Any]
) -> Tensor:
    """Give a stored weight as floats. Raises FileError for a format that is not known."""
    info = declared[key]
    state = next((name for name in declared if name.startswith(key + FOUR_BIT)), None)
    if state is not None:
        return _four_bit(key, state, declared, read)
    scales = key.removesuffix(".weight") + ".SCB"
    if info.dtype == "I8" and scales in declared:
        return read(key).float() * (read(scales).float()[:, None] / 127)
    if info.dtype in FLOATS:
        return read(key)
    if info.dtype.startswith("F8"):
        return _eight_bit_float(key, declared, read)
    kind = (config.get("quantization_config") or {}).get("quant_method", info.dtype)
    raise FileError(
        f"{key} is stored in a format that is not read here: {kind}",
        fix="give the model that it was quantized from, or convert it to bfloat16",
        where=str(info.file),
    )


def shape_of(key: str, declared: Mapping[str, Declared], read: Callable[[str], Tensor]) -> tuple[int, ...]:
    """Give the shape of a weight after reading it back; only of 4-bit weights anything is read."""
    state = next((name for name in declared if name.startswith(key + FOUR_BIT)), None)
    return declared[key].shape if state is None else tuple(_state(read(state))["shape"])


def _four_bit(key: str, state: str, declared: Mapping[str, Declared], read: Callable[[str], Tensor]) -> Tensor:
    """Read NF4 or FP4 as `save_pretrained` writes it: levels packed in bytes, and the scales beside."""
    BASES.module("bitsandbytes")
    from bitsandbytes.nn import Params4bit

    parts = {name.removeprefix(key + "."): read(name) for name in declared if name.startswith(key + ".")}
    return dense(Params4bit.from_prequantized(read(key), parts, device="cpu"))


def _eight_bit_float(key: str, declared: Mapping[str, Declared], read: Callable[[str], Tensor]) -> Tensor:
    """Read FP8 with a scale for all, for each row, or for each block (`weight_scale_inv`, by which it is multiplied, too)."""
    path = key.removesuffix(".weight")
    name = next((n for n in (f"{path}.weight_scale", f"{path}.weight_scale_inv") if n in declared), None)
    if name is None:
        raise FileError(f"{key} is stored in 8 bits without a scale", where=str(declared[key].file))
    weight, scale = read(key).float(), read(name).float()
    for axis in range(scale.dim()):
        size, count = weight.shape[axis], scale.shape[axis]
        if count in (1, size):  # one for all, or one for each
            continue
        each = BLOCK if -(-size // BLOCK) == count else size // count
        if -(-size // each) != count:
            raise FileError(f"{name} {list(scale.shape)} is no scale for {key} {list(weight.shape)}")
        scale = scale.repeat_interleave(each, axis).narrow(axis, 0, size)
    return weight * scale


def _state(raw: Tensor) -> dict[str, Any]:
    return json.loads(bytes(raw.tolist()).decode())


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("text_config") or config


def _nearest(path: str, paths: Iterable[str]) -> list[str]:
    """Give the paths that end as this one does from its block on, those alike in most components."""
    match = re.search(r"(?:^|\.)([^.]+\.\d+\..+)$", path)
    tail = match[1] if match else path
    ends = [p for p in paths if p == tail or p.endswith("." + tail) or path.endswith("." + p)]

    def alike(other: str) -> int:
        return len(set(path.split(".")) & set(other.split("."))) - abs(path.count(".") - other.count("."))

    best = max(map(alike, ends), default=0)
    return [p for p in ends if alike(p) == best]
