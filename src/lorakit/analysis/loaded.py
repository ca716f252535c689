"""One loader for every adapter that lorakit or PEFT writes: what it changes, layer by layer, without its base model.

The file is put, by the same strict reading as everywhere (`interop`), onto a skeleton: layers of the right names and shapes
that hold no weights. So every method, pattern, scale and layer kind means here what it means in training, and what cannot
be read right is refused with the reason.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..core.adapter import AbstractAdapter, AdditiveAdapter, Base, Method
from ..core.attach import Replacement, adapters
from ..core.errors import UsageError
from ..core.fused import Parts
from ..core.stack import settings_of
from ..interop.adapter_directory import CONFIG, SIDE, WEIGHTS
from ..interop.adapter_directory import load as place_file
from ..interop.read import read_json, regular_file
from ..methods.dora import DoRAAdapter
from ..theory import spectrum
from ..theory.spectrum import Factored
from .experts import experts, without_experts
from .experts import settings as expert_settings
from .factors import factors
from .skeleton import KIND, Layer, skeleton

NAME = "default"


@dataclass(frozen=True)
class LoadedModule:
    """What an adapter does to one matrix: a layer's, or that of one part of a fused layer."""

    path: str
    """The layer's path in the model, of a part with its name: `h.0.attn.c_attn.q`."""
    layer: str
    """The layer's path."""
    kind: KIND
    shape: tuple[int, int]
    """(out, in) of the matrix as the layer applies it: transposed for Conv1D and Embedding, kernels flattened."""
    adapter: AbstractAdapter
    A: Tensor | None
    """(r, in); None where the change is not s·B·A (`delta` is then dense)."""
    B: Tensor | None
    """(out, r)."""
    scale: float
    magnitude: Tensor | None
    """(out,) of DoRA: the change is diag(magnitude / ||W + s·B·A||) (W + s·B·A) - W, which needs W."""
    rows: Tensor | None
    """Rows of the layer's matrix that this part of it is."""
    notes: tuple[str, ...] = ()
    expert: tuple[int, bool] | None = None
    """Of one expert of a stacked parameter: its index, and whether the parameter holds (in, out)."""

    @property
    def rank(self) -> int | None:
        """Rank of the factors."""
        return None if self.A is None else len(self.A)

    @property
    def needs_base(self) -> bool:
        """Whether the change depends on W: then `delta` and `factored` want it."""
        return not isinstance(self.adapter, AdditiveAdapter) and self.changes_matrix

    @property
    def changes_matrix(self) -> bool:
        """Whether there is a changed matrix at all: bottlenecks have none, BitFit changes only the bias."""
        return self.adapter.mergeable() and set(self.adapter.roles().values()) != {"bias"}

    @torch.no_grad()
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Give the dense change (out, in) as the method merges it, rounded as merging rounds, in float64; weight where `needs_base`."""
        if not self.changes_matrix:
            return torch.zeros(self.shape, dtype=torch.float64)
        if isinstance(self.adapter, AdditiveAdapter):
            return self.adapter.delta_weight().double()
        if weight is None:
            raise UsageError(
                f"{self.path}: the change depends on the base weight",
                why=f"{type(self.adapter).__name__} is not additive",
                fix="give the base model",
            )
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.adapter.merge(wide).double() - wide.double()

    def factored(self, weight: Tensor | None = None) -> Factored:
        """Give U, S, V of the change: from the factors where there are, else from `delta`, which takes long for large layers."""
        if self.A is not None and self.B is not None and not self.needs_base:
            return spectrum.svd(self.A, self.B, self.scale)
        return spectrum.dense_svd(self.delta(weight))


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter as a list of changed matrices, and what else it holds."""

    directory: Path
    method: str
    settings: Method
    modules: tuple[LoadedModule, ...]
    saved: Mapping[str, Mapping[str, Tensor]]
    """Modules trained in full (`modules_to_save`): path -> their tensors."""
    config: Mapping[str, Any]
    """`adapter_config.json`, for showing."""
    side: Mapping[str, Any]
    """`lorakit.json`, {} if there is none."""
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[LoadedModule]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


def load_adapter(directory: str | Path, layer_of: Callable[[str], Layer] | None = None) -> LoadedAdapter:
    """Read an adapter directory. `layer_of`: kind and shape of a layer of the base, `BaseWeights.layer`.

    It is needed for methods whose file does not say the shapes (VeRA, BitFit, bottlenecks). Raises FileError for a file
    that is damaged, of an unknown method, unconverted from a start that moved the base (PiSSA, OLoRA, CorDA, LoRA-GA), or
    that holds NaN; and where the shapes are needed.

    An unconverted adapter stands on W - s·B0·A0, which is in no file: s·B·A is not its change, and a start repeated on W is only
    as good as the dtype and the SVD that it is repeated with. A converted one is s·(B·A - B0·A0), of rank 2r, and read like any LoRA.
    """
    directory = Path(directory)
    config = read_json(regular_file(directory, CONFIG))
    if config.get("target_parameters"):
        return _with_experts(directory, config, layer_of)
    model, found, notes = skeleton(directory, layer_of)
    place_file(model, directory, NAME)
    modules: list[LoadedModule] = []
    saved: dict[str, Mapping[str, Tensor]] = {}
    method: Method | None = None
    for path, layer, adapter in adapters(model, NAME):
        if isinstance(adapter, Replacement):
            saved[path] = adapter.copy.state_dict()
            continue
        method = adapter.config if method is None else method
        modules += _records(path, found[path], adapter, cast(Base, layer))
    side = read_json(regular_file(directory, SIDE)) if (directory / SIDE).exists() else {}
    settings = cast(Method, method)
    if (side.get("base") or {}).get("quantize"):
        notes += (f"trained on a base in {side['base']['quantize']}: other weights than the checkpoint's",)
    return LoadedAdapter(directory, settings_of(settings)["name"], settings, tuple(modules), saved, config, side, notes)


def _with_experts(directory: Path, config: Mapping[str, Any], layer_of: Callable[[str], Layer] | None) -> LoadedAdapter:
    """Read an adapter with PEFT's `target_parameters`: the experts here, all else as an adapter without them."""
    method = expert_settings(config)
    with without_experts(directory) as rest:
        others = load_adapter(rest, layer_of) if rest is not None else None
    found = [
        LoadedModule(
            one.path,
            one.parameter,
            "expert",
            (len(one.adapter.lora_B), one.adapter.lora_A.shape[1]),
            one.adapter,
            one.adapter.lora_A.detach(),
            one.adapter.lora_B.detach(),
            float(one.adapter.scale),
            magnitude=None,
            rows=None,
            expert=(one.index, one.transposed),
        )
        for one in experts(directory, config, method, layer_of)
    ]
    modules = (*(others.modules if others else ()), *found)
    saved = others.saved if others else {}
    return LoadedAdapter(directory, "lora", method, modules, saved, config, {}, others.notes if others else ())


def tensors_file(directory: str | Path) -> Path:
    """Give the path of an adapter's tensors."""
    return regular_file(Path(directory), WEIGHTS)


def _records(path: str, layer: Layer, adapter: AbstractAdapter, base: Base) -> Iterator[LoadedModule]:
    if isinstance(adapter, Parts):
        for name, part in adapter.each():
            yield _record(f"{path}.{name}", path, layer, part, base, adapter.rows(name))
    else:
        yield _record(path, path, layer, adapter, base, None)


def _record(
    path: str, layer_path: str, layer: Layer, adapter: AbstractAdapter, base: Base, rows: Tensor | None
) -> LoadedModule:
    A, B, scale = factors(adapter, base) or (None, None, 1.0)
    magnitude = adapter.magnitude.detach() if isinstance(adapter, DoRAAdapter) else None
    notes = ("DoRA: the change is not s·B·A alone; its norms need the base",) if magnitude is not None else ()
    if A is None and isinstance(adapter, AdditiveAdapter):
        notes += ("no factors of rank r: measured through the dense change",)
    out = layer.shape.out_features if rows is None else len(rows)
    shape = (out, layer.shape.in_features)
    return LoadedModule(path, layer_path, layer.kind, shape, adapter, A, B, scale, magnitude, rows, notes)


def block_of(path: str) -> tuple[int | None, str]:
    """Give (index of the block, name inside it) of a path: `model.layers.3.mlp.up_proj` is (3, "mlp.up_proj")."""
    match = re.search(r"(?:^|\.)(\d+)\.", path)
    return (int(match[1]), path[match.end() :]) if match else (None, path)
