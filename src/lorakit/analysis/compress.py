"""An adapter of lower rank: how much is cut where, what that costs in weights and in outputs, and the factors that are left.

Without data the best X of rank q in the place of ΔW is its truncated SVD; with the second moments of the inputs it is the best
one for each layer's outputs (`theory/activation.py`). Neither is a statement about the loss, and neither always loses less: on
a character model the second lost 8 to 17 % less of the gain, on SmolLM2 5 to 19 % more after 6 steps and the same after 32. The
share of energy that is discarded is a poor prediction of the share of the gain that is lost (`SEEN`); only measuring the loss
says what it is.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import FileError, UsageError
from ..interop.adapter_directory import WEIGHTS
from ..interop.read import read_header, regular_file
from ..theory import activation, flops
from ..theory import spectrum as sp
from ..theory.number import Kind, Number
from ..theory.spectrum import Factored
from .base_weights import BaseWeights
from .loaded import LoadedAdapter, LoadedModule
from .lora_files import Factors, Lora
from .skeleton import skeleton

SEEN = {
    "weight_error": "0.8 to 1.1 times this on a tiny model that was trained to the end; on SmolLM2-135M 0.2 to 0.5 times after 6 steps, "
    "0.01 to 0.17 after 32",
    "output_error": "on SmolLM2-135M 1.5 to 1.7 times this after 6 steps (ranks 1 to 6 of 8), 0.2 to 0.5 times after 32 (1 to 8 of 16)",
}
"""What the measured share of the gain was beside the predicted one, where both are known."""
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Cut:
    """How to choose a rank: `rank` at most, or the least one that discards at most the share `tol` of the energy of a module."""

    rank: int | None = None
    tol: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.tol is None):
            raise UsageError("give a rank or a tolerance, one of them", fix="--rank 8, or --tol 0.05")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"a rank of {self.rank} leaves nothing", fix="--rank 1 at least")
        if self.tol is not None and not 0 <= self.tol < 1:
            raise UsageError(f"--tol {self.tol:g} is no share of the energy", fix="from 0 to below 1")

    def of(self, energies: Tensor, most: int) -> int:
        """Give the rank for singular values whose squares these are; 1 at least, as a LoRA has."""
        if self.rank is not None:
            return max(1, min(self.rank, most))
        return max(1, min(sp.energy_rank(energies.sqrt(), 1 - float(self.tol or 0)), most))


@dataclass(frozen=True)
class CutModule:
    """One module with its new factors in the dtype they are stored in. The scale is that of the whole adapter."""

    module: LoadedModule
    A: Tensor
    B: Tensor
    numbers: Mapping[str, Number]

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        numbers = {name: number.json() for name, number in self.numbers.items()}
        return {"path": self.module.path, "rank_before": self.module.rank, "rank": len(self.A), "numbers": numbers}


@dataclass(frozen=True)
class Compressed:
    """All modules, and the whole: energies of the modules added up."""

    modules: tuple[CutModule, ...]
    scale: float
    numbers: Mapping[str, Number]
    notes: tuple[str, ...]
    parameters: tuple[int, int]
    """Before and after, of the changed matrices."""

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        return {
            "scale": self.scale,
            "parameters_before": self.parameters[0],
            "parameters": self.parameters[1],
            "numbers": {name: number.json() for name, number in self.numbers.items()},
            "modules": [module.json() for module in self.modules],
            "notes": list(self.notes),
        }


def compress(
    adapter: LoadedAdapter,
    cut: Cut,
    base: BaseWeights | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> Compressed:
    """Cut an adapter. moments: E[x x^T] (in, in) of each layer's inputs, by layer path, in the order they are best asked for.

    A change without factors is approximated through its dense matrix, one that depends on W on the weights of `base`. Raises
    UsageError for an adapter that is no change of matrices and for a needed base that is missing.
    """
    _require_matrices(adapter, base)
    scale = Counter(m.scale for m in adapter if m.A is not None).most_common(1)
    s = scale[0][0] if scale else 1.0
    stored = _stored_as(adapter.directory)
    order = {path: i for i, path in enumerate(moments or ())}
    modules = sorted(adapter, key=lambda m: order.get(m.layer, len(order)))
    made: list[CutModule] = []
    for module in modules:
        W = base.matrix(module) if base is not None and module.needs_base else None
        moment = moments[module.layer] if moments is not None and module.layer in order else None
        made.append(_cut(module, module.factored(W), cut, s, stored, moment))
    before = sum(flops.parameters(*m.module.shape, m.module.rank) for m in made if m.module.rank is not None)
    after = sum(m.A.numel() + m.B.numel() for m in made)
    return Compressed(tuple(made), s, _whole(made), tuple(_notes(adapter, made, moments)), (before, after))


def as_lora(adapter: LoadedAdapter, made: Compressed, base: BaseWeights | None = None) -> Lora:
    """Give the directory's content: factors by layer, those of the parts of a fused layer put together, and what else is kept."""
    layers = skeleton(adapter.directory, None if base is None else base.layer).model
    grouped: dict[str, list[CutModule]] = {}
    for own in made.modules:
        grouped.setdefault(own.module.layer, []).append(own)
    side = {key: value for key, value in adapter.side.items() if key not in ("format", "method", "parts", "fused")}
    return Lora(
        {path: _together(layers.get_submodule(path), its) for path, its in grouped.items()},
        made.scale,
        _targets(adapter, list(grouped)),
        adapter.config.get("base_model_name_or_path"),
        adapter.config.get("task_type"),
        adapter.saved,
        {**side, "compressed": {name: number.json() for name, number in made.numbers.items()}},
    )


def _cut(
    module: LoadedModule, delta: Factored, cut: Cut, scale: float, stored: torch.dtype, moment: Tensor | None
) -> CutModule:
    most = max(1, sp.numerical_rank(delta.S, *module.shape))
    if moment is None:
        q = cut.of(delta.S.square(), most)
        A, B = sp.truncated(delta, q, scale)
    else:
        seen = activation.seen(delta, moment.to(delta.S.device))
        q = cut.of(seen.mu.square(), most)
        A, B = activation.truncated(delta, seen, q, scale)
    A, B = A.to(stored), B.to(stored)
    return CutModule(module, A, B, _errors(delta, A, B, scale, moment, sp.truncation_error(delta.S, q).frobenius))


def _errors(
    delta: Factored, A: Tensor, B: Tensor, scale: float, moment: Tensor | None, least: float
) -> dict[str, Number]:
    """Measure ΔW - s·B·A from factors, as it is stored. Its norm cancels nothing: it is that of the stacked factors' core."""
    lost_B = torch.cat([delta.U * delta.S, -scale * B.double()], dim=1)
    lost_A = torch.cat([delta.V.T, A.double()])
    lost = sp.svd(lost_A, lost_B)
    size, top = sp.frobenius(delta.S), sp.spectral(delta.S)

    def exact(value: float, whole: float, formula: str, **inputs: float) -> Number:
        return Number(value / whole if whole else 0.0, Kind.EXACT, formula, inputs={"of": whole, **inputs})

    numbers = {
        "weight_error": exact(sp.frobenius(lost.S), size, "weight_error", least=least / size if size else 0.0),
        "spectral_error": exact(sp.spectral(lost.S), top, "weight_error"),
    }
    if moment is not None:
        whole = activation.output_norm(delta, moment)
        numbers["output_error"] = exact(activation.output_norm(lost, moment), whole, "output_error")
    return numbers


def _whole(modules: Sequence[CutModule]) -> dict[str, Number]:
    """Put modules together by the energy of their changes, and say what that is taken to cost.

    Output errors too: the outputs of different layers are in units of their own, and a few layers have huge ones.
    """
    found: dict[str, Number] = {}
    for name in ("weight_error", "output_error"):
        having = [m for m in modules if name in m.numbers]
        energies = [m.numbers["weight_error"].inputs["of"] ** 2 for m in having]
        if having and any(energies):
            lost = sum(e * m.numbers[name].value ** 2 for e, m in zip(energies, having, strict=True)) / sum(energies)
            found[name] = Number(math.sqrt(lost), Kind.EXACT, name, inputs={"modules": len(having)})
    name = "output_error" if "output_error" in found else "weight_error"
    if name in found:
        inputs = {"from": name, "seen": SEEN[name]}
        found["predicted_lost_gain"] = Number(found[name].value ** 2, Kind.HEURISTIC, "lost_gain", inputs=inputs)
    return found


def _notes(adapter: LoadedAdapter, made: list[CutModule], moments: Mapping[str, Tensor] | None) -> Iterator[str]:
    yield from adapter.notes
    dense = [m.module for m in made if m.module.A is None or m.module.needs_base]
    if dense:
        yield f"{len(dense)} changes of {adapter.method} are not s·B·A: approximated through their dense matrices"
    idle = [m.module.path for m in made if not bool(m.A.any() and m.B.any())]
    if idle:
        yield f"{len(idle)} modules are not changed by the adapter and keep rank 1: {', '.join(idle[:3])}"
    blind = [m.module.path for m in made if moments is not None and "output_error" not in m.numbers]
    if blind:
        yield f"cut in weights, for their inputs are not measured (token ids): {', '.join(blind[:3])}"
    if adapter.saved:
        yield f"kept in full: {', '.join(adapter.saved)}"


def _require_matrices(adapter: LoadedAdapter, base: BaseWeights | None) -> None:
    """Raise UsageError for what no LoRA can be."""
    other = [m for m in adapter if not m.changes_matrix or not _leaves_bias(m, base)]
    if other or not len(adapter):
        raise UsageError(
            f"a {adapter.method} adapter cannot be written as a LoRA of lower rank",
            why=f"{other[0].path} is changed in another way than by adding a matrix to its weight" if other else None,
        )
    needing = [m for m in adapter if m.needs_base]
    if needing and base is None:
        raise UsageError(
            f"a {adapter.method} adapter is not low-rank: its change depends on the base weights",
            why=f"{needing[0].path} and {len(needing) - 1} more" if len(needing) > 1 else needing[0].path,
            fix="--base MODEL approximates it by the best LoRA on those weights",
        )


def _leaves_bias(module: LoadedModule, base: BaseWeights | None) -> bool:
    """Whether the layer's bias stays as it is, or there is none."""
    if base is not None and not base.layer(module.layer).shape.bias:
        return True
    bias = torch.ones(module.shape[0])
    with torch.no_grad():
        changed = module.adapter.merge_bias(bias.clone())
    return changed is not None and torch.equal(changed, bias)


def _together(layer: nn.Module, parts: list[CutModule]) -> Factors:
    """Give one pair for a layer: that of the layer itself, or those of its parts, A stacked and B in the parts' rows."""
    if len(parts) == 1 and parts[0].module.rows is None:
        return Factors(layer, parts[0].A, parts[0].B)
    A, out, column = torch.cat([own.A for own in parts]), _rows_of(layer), 0
    B = A.new_zeros(out, len(A))
    for own in parts:
        B[own.module.rows, column : column + len(own.A)] = own.B
        column += len(own.A)
    return Factors(layer, A, B)


def _rows_of(layer: nn.Module) -> int:
    if not isinstance(layer, nn.Linear):
        raise FileError(f"parts of a {type(layer).__name__} are not known")
    return layer.out_features


def _targets(adapter: LoadedAdapter, paths: list[str]) -> list[str] | str:
    """Give the entries of the source, which name these layers, unless other fields narrow them down: then whole paths."""
    config = adapter.config
    if config.get("exclude_modules") or config.get("layers_to_transform") is not None:
        return sorted(paths)
    return config["target_modules"]


def _stored_as(directory: Path) -> torch.dtype:
    """Give the dtype that the source stores its factors in; float32 where they are of several."""
    header = read_header(regular_file(directory, WEIGHTS))
    kinds = {info.dtype for info in header.values() if len(info.shape) > 1}
    return STORED.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
