"""The best LoRA of a fully fine-tuned model: W_tuned - W_base of each matrix, cut to rank r, one matrix in memory at a time.

The truncated SVD is the best possible in every unitarily invariant norm (Eckart and Young 1936, Mirsky 1960), with the error
sqrt(sum_{i>r} σ_i^2) exactly. Beside it stands the rank that Gavish and Donoho would keep if the rest were noise; that is an
object here, for a full fine-tuning delta is of full rank. Every tensor of the tuned model is compared: what changed and is no
matrix of a targeted layer (norms, biases, embeddings, a new head) is listed, never left out silently.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import CheckError, FileError, UsageError
from ..core.kinds import Conv1DKind, EmbeddingKind, kind
from ..core.target import ALL_LINEAR, Target, sites
from ..models.directory import fingerprint
from ..theory import noise
from ..theory import spectrum as sp
from ..theory.number import Kind, Number
from .base_weights import BaseWeights
from .lora_files import Factors, Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALES = (".SCB", ".weight_scale", ".weight_scale_inv", ".weight_format", ".input_scale")
"""Endings of what belongs to a quantized weight and is no weight itself."""


@dataclass(frozen=True)
class Wanted:
    """How much of each change to keep: a rank, or the least rank that has this share of its energy."""

    rank: int | None = None
    energy: float | None = None
    target_modules: str | Sequence[str] = ALL_LINEAR

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise UsageError("give a rank or an energy, one of them", fix="--rank 16, or --energy 0.9")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"a rank of {self.rank} keeps nothing", fix="--rank 1 at least")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"--energy {self.energy:g} is no share", fix="above 0 and at most 1")

    def of(self, S: Tensor, most: int) -> int:
        """Give the rank for these singular values."""
        q = self.rank if self.rank is not None else sp.energy_rank(S, float(self.energy or 1))
        return max(1, min(q, most))


@dataclass(frozen=True)
class Extracted:
    """One matrix: its factors (scale 1) and its numbers."""

    path: str
    layer: nn.Module
    A: Tensor
    B: Tensor
    numbers: Mapping[str, Number]

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        numbers = {name: number.json() for name, number in self.numbers.items()}
        return {"path": self.path, "rank": len(self.A), "shape": [len(self.B), self.A.shape[1]], "numbers": numbers}


@dataclass(frozen=True)
class Rest:
    """A tensor that changed and is no matrix of a targeted layer; `relative`: ||change|| / ||before||, NaN if it is new."""

    path: str
    name: str
    size: int
    relative: float


@dataclass(frozen=True)
class Extraction:
    """All of it. `kept`: module path -> its tensors, for `modules_to_save`, where the rest is to be kept."""

    modules: tuple[Extracted, ...]
    rest: tuple[Rest, ...]
    kept: Mapping[str, Mapping[str, Tensor]]
    same: int
    """Tensors that did not change."""
    numbers: Mapping[str, Number] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        return {
            "numbers": {name: number.json() for name, number in self.numbers.items()},
            "modules": [module.json() for module in self.modules],
            "rest": [{"tensor": f"{r.path}.{r.name}", "entries": r.size, "relative": r.relative} for r in self.rest],
            "kept_in_full": list(self.kept),
            "unchanged_tensors": self.same,
        }


def extract(
    base: BaseWeights, tuned: BaseWeights, model: "PreTrainedModel", wanted: Wanted, *, full: bool = False
) -> Extraction:
    """Extract. model: the tuned one without weights (`models.skeleton`), which says what its layers are.

    full: keep modules whose change is not a targeted matrix whole. Raises FileError for models of different shapes, CheckError
    if nothing changed, UsageError for targets that match nothing.
    """
    targets = {site.path for site in sites(model, Target(target_modules=wanted.target_modules)) if site.part is None}
    _refuse_tied(model, targets)
    modules: list[Extracted] = []
    rest: list[Rest] = []
    same = 0
    for path, name, before, after in _pairs(base, tuned):
        layer = _layer(model, path)
        if before is not None and torch.equal(before, after):
            same += 1
        elif before is not None and layer is not None and path in targets and name == "weight":
            modules.append(_extracted(path, layer, before, after, wanted))
        else:
            change = math.nan if before is None else float((after.double() - before.double()).norm())
            size = 0.0 if before is None else float(before.double().norm())
            rest.append(Rest(path, name, after.numel(), change / size if size else math.nan))
    if not modules and not rest:
        raise CheckError("the two models have the same weights", where=str(tuned.directory))
    kept = _in_full(model, tuned, rest) if full else {}
    modules = [own for own in modules if own.path not in kept]
    return Extraction(tuple(modules), tuple(rest), kept, same, _whole(modules))


def as_lora(
    found: Extraction, model: "PreTrainedModel", base: BaseWeights, name: str, labels: Sequence[str] | None
) -> Lora:
    """Give the directory's content. name: what the base is called. labels: the class names of a classifier."""
    paths = [own.path for own in found.modules]
    side: dict[str, Any] = {"base": {"name": name, "quantize": None, "fingerprint": fingerprint(base.directory)}}
    if labels is not None:
        side |= {"task": "classification", "labels": list(labels)}
    return Lora(
        {own.path: Factors(own.layer, own.A, own.B) for own in found.modules},
        1.0,
        _shortest(model, paths),
        name,
        "CAUSAL_LM" if labels is None else "SEQ_CLS",
        found.kept,
        {**side, "extracted": {key: number.json() for key, number in found.numbers.items()}},
    )


def _pairs(base: BaseWeights, tuned: BaseWeights) -> Iterator[tuple[str, str, Tensor | None, Tensor]]:
    """Yield (module path, tensor name, before, after) of every tensor of the tuned model; before is None where it is new."""
    names = [n for n in tuned.declared if n.rpartition(".")[0] not in tuned.declared and not n.endswith(SCALES)]
    names.sort(key=lambda n: (str(tuned.declared[n].file), tuned.declared[n].start))
    wrong = []
    for key in names:
        path, _, name = key.rpartition(".")
        other = _counterpart(base, key, path, name)
        after = tuned.tensor(key)
        before = None if other is None else base.tensor(other)
        if before is not None and before.shape != after.shape:
            wrong.append(f"{key} {list(before.shape)} and {list(after.shape)}")
        elif not wrong:
            yield path, name, before, after
    if wrong:
        raise FileError(
            f"{len(wrong)} tensors have other shapes in the tuned model: {', '.join(wrong[:3])}",
            why="it was tuned from another base, or its vocabulary was resized",
            fix="give the model that it was tuned from",
            where=str(tuned.directory),
        )


def _counterpart(base: BaseWeights, key: str, path: str, name: str) -> str | None:
    """Give the name of the same tensor in the base's files; prefixes may differ, and a tied head is the embedding."""
    if key in base.declared:
        return key
    try:
        weight = base.key(path)
    except FileError:
        return None
    found = weight if name == "weight" else f"{weight.removesuffix('weight')}{name}"
    return found if found in base.declared else None


def _extracted(path: str, layer: nn.Module, before: Tensor, after: Tensor, wanted: Wanted) -> Extracted:
    W, D = (_matrix(layer, t) for t in (before.double(), after.double() - before.double()))
    delta = sp.dense_svd(D)
    q = wanted.of(delta.S, min(D.shape))
    A, B = sp.truncated(delta, q)
    size, whole = sp.frobenius(delta.S), float(W.norm())
    error = sp.truncation_error(delta.S, q)
    inputs = {"d": len(D), "k": D.shape[1], "rank": q}

    def exact(value: float, formula: str) -> Number:
        return Number(value, Kind.EXACT, formula, inputs=inputs)

    numbers = {
        "frobenius": exact(size, "frobenius"),
        "relative_norm": exact(size / whole if whole else math.nan, "relative_norm"),
        "error": exact(error.frobenius / size, "truncation"),
        "spectral_error": exact(error.spectral / sp.spectral(delta.S), "truncation"),
        "effective_rank": exact(sp.effective_rank(delta.S), "effective_rank"),
        "gavish_donoho_rank": Number(_above_noise(delta.S, *D.shape), Kind.ESTIMATE, "median_threshold", inputs=inputs),
    }
    return Extracted(path, layer, A.float(), B.float(), numbers)


def _above_noise(S: Tensor, d: int, k: int) -> float:
    """Count the singular values above ω(β) times their median: what is worth keeping if the bulk is noise."""
    return float((noise.omega(min(d, k) / max(d, k)) * S.median() < S).sum())


def _matrix(layer: nn.Module, stored: Tensor) -> Tensor:
    """Give a stored weight as the matrix (out, in) that the layer applies."""
    mixin = kind(layer)
    turned = mixin is not None and issubclass(mixin, Conv1DKind | EmbeddingKind)
    return stored.T if turned else stored.flatten(1)


def _whole(modules: Sequence[Extracted]) -> dict[str, Number]:
    energies = [own.numbers["frobenius"].value ** 2 for own in modules]
    total = math.fsum(energies)
    if not total:
        return {}
    lost = math.fsum(e * own.numbers["error"].value ** 2 for e, own in zip(energies, modules, strict=True))
    inputs = {"modules": len(modules)}
    return {"error": Number(math.sqrt(lost / total), Kind.EXACT, "truncation", inputs=inputs)}


def _in_full(model: "PreTrainedModel", tuned: BaseWeights, rest: Sequence[Rest]) -> dict[str, dict[str, Tensor]]:
    """Give all tensors of every module that holds something of the rest. Both ends of a tied embedding are kept, each whole."""
    unknown = [f"{r.path}.{r.name}" for r in rest if _layer(model, r.path) is None]
    if unknown:
        raise FileError(
            f"{len(unknown)} tensors that changed belong to no module of {type(model).__name__}: {', '.join(unknown[:3])}",
            fix="leave them out with --drop-rest, or keep the tuned model",
        )
    kept: dict[str, dict[str, Tensor]] = {}
    for path in dict.fromkeys(r.path for r in rest):
        own = {k.removeprefix(f"{path}."): tuned.tensor(k) for k in tuned.declared if k.startswith(f"{path}.")}
        kept[path] = {name: tensor for name, tensor in own.items() if "." not in name}
    head = _tied_head(model)
    ends = [path for path, module in model.named_modules() if module is model.get_input_embeddings()]
    if head is not None and ends and ends[0] in kept:
        kept[head] = dict(kept[ends[0]])
    return kept


def _refuse_tied(model: "PreTrainedModel", targets: set[str]) -> None:
    """Raise UsageError for a low-rank change of an embedding that is the head too: an adapter would change one end of it."""
    head = _tied_head(model)
    if head is None:
        return
    table = model.get_input_embeddings()
    both = [path for path, module in model.named_modules() if path in targets and (module is table or path == head)]
    if both:
        raise UsageError(
            f"{both[0]} is tied to the other end of the model",
            why="a LoRA there changes one of the two, the tuned model changed both",
            fix="leave it out of the targets; --full keeps both ends whole",
        )


def _tied_head(model: "PreTrainedModel") -> str | None:
    """Give the path of an output head whose weight is the embedding's."""
    head = model.get_output_embeddings()
    if head is None or not model.config.get_text_config().to_dict().get("tie_word_embeddings"):
        return None
    return next((path for path, module in model.named_modules() if module is head), None)


def _layer(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _shortest(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Give last components if they name exactly these layers, else the whole paths."""
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    named = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in leaves}
    return leaves if named == set(paths) else sorted(paths)
