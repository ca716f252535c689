"""PEFT's `target_parameters`: LoRA on a parameter that stacks the matrices of E experts, (E, out, in) or (E, in, out).

    <module>.lora_A.weight (E r, in)   row e r + j: row j of expert e's A
    <module>.lora_B.weight (out, r E)  column j E + e: column j of expert e's B

With several parameters on one module, all but one stand behind `base_layer.`, in an order that only the model knows: they are
told apart by their shapes in the base, and refused where these do not tell.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors.torch
import torch
from torch import Tensor

from ..core.adapter import Method, Shape
from ..core.errors import FileError
from ..core.pattern import Budget, compile_safe, is_suffix
from ..interop.adapter_directory import CONFIG, SIDE, WEIGHTS
from ..interop.keys import PREFIX
from ..interop.peft_reading import read_config
from ..interop.read import read_json, read_tensors, regular_file, shown
from ..methods.lora import LoRA, LoRAAdapter
from .skeleton import Layer


class Expert(NamedTuple):
    """One expert's change: path `layers.0.experts.down_proj.3` of the parameter `layers.0.experts.down_proj`."""

    path: str
    parameter: str
    index: int
    transposed: bool
    """Whether the parameter holds (in, out)."""
    adapter: LoRAAdapter


@contextmanager
def without_experts(directory: Path) -> Generator[Path | None]:
    """Give a copy of an adapter directory that holds only what is not about experts; None if nothing else is in it."""
    config = read_json(regular_file(directory, CONFIG))
    tensors = read_tensors(regular_file(directory, WEIGHTS))
    rest = {key: t for key, t in tensors.items() if _place(key, config) is None}
    if not rest:
        yield None
        return
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "adapter"
        copy.mkdir()
        plain = {k: v for k, v in config.items() if k != "target_parameters"}
        for key in ("rank_pattern", "alpha_pattern"):
            plain[key] = {k: v for k, v in (config.get(key) or {}).items() if not _of_experts(k, config)}
        (copy / CONFIG).write_text(json.dumps(plain))
        safetensors.torch.save_file(rest, copy / WEIGHTS)
        if (directory / SIDE).exists():
            shutil.copyfile(regular_file(directory, SIDE), copy / SIDE)
        yield copy


def settings(config: Mapping[str, Any]) -> LoRA:
    """Give the method of an adapter with `target_parameters`. Raises FileError for one other than plain LoRA."""
    plain = {k: v for k, v in config.items() if k != "target_parameters"}
    method: Method = read_config({**plain, "target_modules": plain.get("target_modules") or []}, {})[0]
    if not isinstance(method, LoRA):
        raise FileError("target_parameters with a method other than LoRA", why=f"it is {type(method).__name__}")
    return method


def experts(
    directory: Path, config: Mapping[str, Any], method: LoRA, layer_of: Callable[[str], Layer] | None
) -> Iterator[Expert]:
    """Yield every expert's change, parameter by parameter."""
    stacks: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in read_tensors(regular_file(directory, WEIGHTS)).items():
        place = _place(key, config)
        if place is not None:
            module, depth, factor = place
            stacks.setdefault(module, {}).setdefault(depth, {})[factor] = tensor
    for module, by_depth in stacks.items():
        names = [e.rpartition(".")[2] for e in config["target_parameters"] if _on(e, module)]
        yield from _of_module(module, list(by_depth.values()), names, config, method, layer_of)


def _of_module(
    module: str,
    pairs: list[dict[str, Tensor]],
    names: list[str],
    config: Mapping[str, Any],
    method: LoRA,
    layer_of: Callable[[str], Layer] | None,
) -> Iterator[Expert]:
    if len(names) != len(pairs) or any(set(pair) != {"A", "B"} for pair in pairs):
        raise FileError(
            f"{shown(module)} has factors for {len(pairs)} parameters, adapter_config.json names {len(names)}"
        )
    if any(not bool(torch.isfinite(t).all()) for pair in pairs for t in pair.values()):
        raise FileError(f"the factors of {shown(module)} hold NaN or infinite values")
    if len(names) > 1 and layer_of is None:
        raise FileError(
            f"the file does not say which factors of {shown(module)} belong to {' and '.join(names)}",
            fix="give the base model (--base MODEL)",
        )
    shapes = {n: layer_of(f"{module}.{n}").kernel if layer_of else None for n in names}
    for name in names:
        parameter = f"{module}.{name}"
        r, alpha = (
            int(_pattern(config, "rank", parameter, method.r)),
            _pattern(config, "alpha", parameter, method.alpha),
        )
        fitting = [p for p in pairs if _fits(p, shapes[name], r)]
        if len(fitting) != 1:
            why = "no factors have its shape" if not fitting else "several factors have its shape"
            raise FileError(f"cannot tell the factors of {shown(parameter)}", why=why)
        yield from _split(
            parameter, fitting[0], LoRA(r=r, alpha=alpha, rank_stabilized=method.rank_stabilized), shapes[name]
        )


def _split(parameter: str, pair: Mapping[str, Tensor], method: LoRA, shape: tuple[int, ...] | None) -> Iterator[Expert]:
    A, B = pair["A"].float(), pair["B"].float()
    count, inner, out = len(A) // method.r, A.shape[1], B.shape[0]
    if shape is not None and inner == out:
        raise FileError(
            f"{shown(parameter)} holds square matrices", why="its shape does not tell (out, in) from (in, out)"
        )
    transposed = shape is not None and shape[1:] == (inner, out)
    for e, (own_A, own_B) in enumerate(
        zip(A.reshape(count, method.r, inner), B.reshape(out, method.r, count).unbind(-1), strict=True)
    ):
        adapter = cast(LoRAAdapter, method.build(Shape(out, inner, bias=False)))
        with torch.no_grad():
            adapter.lora_A.copy_(own_A)
            adapter.lora_B.copy_(own_B)
        yield Expert(f"{parameter}.{e}", parameter, e, transposed, adapter)


def _fits(pair: Mapping[str, Tensor], shape: tuple[int, ...] | None, r: int) -> bool:
    (rows, inner), (out, columns) = pair["A"].shape, pair["B"].shape
    whole = rows == columns and rows % r == 0
    return whole and (shape is None or (shape[0] * r == rows and {shape[1:], shape[:0:-1]} >= {(out, inner)}))


def _pattern(config: Mapping[str, Any], what: str, name: str, default: Any) -> Any:
    """Give the entry of rank_pattern or alpha_pattern for a parameter."""
    for key, value in (config.get(f"{what}_pattern") or {}).items():
        if compile_safe(key, Budget(1)).matches_end(name):
            return value
    return default


def _place(key: str, config: Mapping[str, Any]) -> tuple[str, int, str] | None:
    """Give (module, depth, "A" or "B") of a tensor that is about experts."""
    match = re.fullmatch(rf"{re.escape(PREFIX)}(.+?)((?:\.base_layer)*)\.lora_([AB])\.weight", key)
    if match is None or not any(_on(entry, match[1]) for entry in config["target_parameters"]):
        return None
    return match[1], match[2].count("."), match[3]


def _on(entry: str, module: str) -> bool:
    """Whether an entry of `target_parameters` names a parameter of this module."""
    return is_suffix(entry.rpartition(".")[0], module)


def _of_experts(pattern: str, config: Mapping[str, Any]) -> bool:
    return any(compile_safe(pattern, Budget(1)).matches_end(entry) for entry in config["target_parameters"])
