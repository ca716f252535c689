"""Which layers get an adapter, with which rank and scale.

Every entry must match at least one layer: a name that matches nothing is an error with the names that do exist, never a
silent half of what was asked for.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from . import fused
from .errors import UsageError
from .kinds import Kind, is_linear, kind
from .pattern import Budget, compile_safe, is_suffix, suffixes

ALL_LINEAR = "all-linear"
SHOWN = 10  # entries of a list that an error names
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Target:
    """Which layers to adapt.

    target_modules: "all-linear" (every Linear and Conv1D except the output head), a list of names (a path or its last
        components; parts of fused projections as `c_attn.q`), or one regular expression that matches the whole path.
    exclude_modules: the same forms, taken out again.
    layers, last_n_layers: only blocks with these indices; only the last n blocks of each stack.
    rank_pattern, alpha_pattern: name or regular expression -> rank, alpha for the layers it matches.
    modules_to_save: names of modules that are trained in full and saved (a classification head).
    fused: sizes (or ranges of rows) of the parts of fused projections that are not known by name.
    """

    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    layers: Sequence[int] | None = None
    last_n_layers: int | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    modules_to_save: Sequence[str] | None = None
    fused: Mapping[str, Mapping[str, int | Sequence[Sequence[int]]]] | None = None


class Site(NamedTuple):
    """A place for an adapter: a layer, or a part of a fused one (`rows` of its matrix)."""

    path: str
    layer: nn.Module
    part: str | None = None
    rows: Tensor | None = None

    @property
    def name(self) -> str:
        """Give the path, with the part as its last component."""
        return self.path if self.part is None else f"{self.path}.{self.part}"


@runtime_checkable
class LanguageModel(Protocol):
    """A transformers model: it can say which layer is its output head."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Give the output head."""
        ...


def sites(model: nn.Module, target: Target) -> list[Site]:
    """Give the places that `target` names, in the model's order.

    Raises UsageError for entries that match nothing, with close names, all of them at once.
    """
    every = _every_site(model, target.fused)
    saved = {path for path, _ in saved_modules(model, target)}
    free = [s for s in every if not any(s.path == p or s.path.startswith(p + ".") for p in saved)]
    chosen = _select(free, target.target_modules, "target_modules", model)
    if target.exclude_modules is not None:
        out = {s.name for s in _select(free, target.exclude_modules, "exclude_modules", model)}
        chosen = [s for s in chosen if s.name not in out and s.path not in out]
    chosen = _in_layers(model, chosen, target)
    if not chosen and target.target_modules:
        raise UsageError(
            "no layer is left to adapt", why="exclude_modules, layers and last_n_layers took out every target"
        )
    whole = {s.path for s in chosen if s.part is None}
    twice = sorted({s.path for s in chosen if s.part is not None} & whole)
    if twice:
        raise UsageError(
            f"{twice[0]} is targeted as a whole and by its parts", fix="name the layer or its parts, not both"
        )
    return chosen


def saved_modules(model: nn.Module, target: Target) -> list[tuple[str, nn.Module]]:
    """Give (path, module) of the modules that are trained in full. Raises UsageError for a name that matches none."""
    if not target.modules_to_save:
        return []
    modules = [(path, m) for path, m in model.named_modules() if path and ".adapters." not in path]
    found: dict[str, nn.Module] = {}
    for entry in target.modules_to_save:
        hits = {path: m for path, m in modules if is_suffix(entry, path)}
        if not hits:
            raise _unmatched("modules_to_save", [entry], [path for path, _ in modules], model)
        found |= hits
    return list(found.items())


def by_pattern(patterns: Mapping[str, T] | None, names: Sequence[str], what: str, model: nn.Module) -> dict[str, T]:
    """Give name -> value for the names that a pattern (name, suffix or regular expression) matches; the first pattern wins."""
    values: dict[str, T] = {}
    unmatched = []
    budget = Budget(len(names))
    for pattern, value in (patterns or {}).items():
        matches = _matcher(pattern, budget)
        hits = [name for name in names if matches(name)]
        if not hits:
            unmatched.append(pattern)
        for name in hits:
            values.setdefault(name, value)
    if unmatched:
        raise _unmatched(what, unmatched, names, model)
    return values


def selection(chosen: list[Site], wanted: str | Sequence[str], what: str, model: nn.Module) -> set[str]:
    """Give the names of the places among `chosen` that `wanted` names, in the forms of `target_modules`."""
    return {site.name for site in _select(chosen, wanted, what, model)}


def _matcher(pattern: str, budget: Budget) -> Callable[[str], object]:
    plain = re.fullmatch(
        r"(\^?)([\w.-]+)\$?", pattern
    )  # most are: a name, or ^ and a whole path, as PEFT's own examples
    if plain:
        anchored, name = plain.groups()
        return name.__eq__ if anchored else lambda path: is_suffix(name, path)
    return compile_safe(pattern, budget).matches_end


def _every_site(model: nn.Module, declared: Mapping[str, fused.Declared] | None) -> list[Site]:
    found = []
    for path, layer in model.named_modules():
        mixin: type[Kind] | None = kind(layer) if ".adapters." not in path else None
        if mixin is None:
            continue
        found.append(Site(path, layer))
        for part, rows in fused.parts(model, path, mixin.shape(layer).out_features, declared).items():  # type: ignore[invalid-argument-type]
            found.append(Site(path, layer, part, rows))
    return found


def _select(every: list[Site], wanted: str | Sequence[str], what: str, model: nn.Module) -> list[Site]:
    if wanted == ALL_LINEAR:
        head = model.get_output_embeddings() if isinstance(model, LanguageModel) else None
        return [s for s in every if s.part is None and s.layer is not head and is_linear(s.layer)]
    if isinstance(wanted, str):
        # As in PEFT, one string is a regular expression for the whole path; a plain name means that path.
        matches = compile_safe(wanted, Budget(len(every))).fullmatch
        hits = [s for s in every if matches(s.name)]
        if not hits:
            raise _unmatched(what, [wanted], [s.name for s in every], model)
    else:
        names = set(wanted)
        hits = [s for s in every if not names.isdisjoint(suffixes(s.name))]
        found = {end for s in hits for end in suffixes(s.name)}
        lost = [entry for entry in wanted if entry not in found]
        if lost:
            raise _unmatched(what, lost, [s.name for s in every], model, matched=[e for e in wanted if e in found])
    for site in hits:
        if isinstance(site.layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise UsageError(
                f"{what}: {site.path} cannot carry an adapter",
                why="nn.MultiheadAttention reads its weight and never runs the layer, so the adapter would do nothing",
                fix="train the attention in full with modules_to_save, or leave it out",
            )
    return hits


def _in_layers(model: nn.Module, chosen: list[Site], target: Target) -> list[Site]:
    if target.layers is None and target.last_n_layers is None:
        return chosen
    if target.layers is not None and target.last_n_layers is not None:
        raise UsageError("layers and last_n_layers are both given", fix="give one of them")
    lists = {path: len(m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    placed = [(s, *block(s.path, lists)) for s in chosen]
    if target.last_n_layers is not None:
        return [s for s, index, count in placed if index is not None and index >= count - target.last_n_layers]
    absent = sorted(set(target.layers or ()) - {index for _, index, _ in placed if index is not None})
    if absent:
        have = sorted({index for _, index, _ in placed if index is not None})
        raise UsageError(f"layers: no block {absent}", why=f"the targets lie in blocks {have[:1]} to {have[-1:]}")
    return [s for s, index, _ in placed if index in (target.layers or ())]


def block(path: str, lists: Mapping[str, int]) -> tuple[int | None, int]:
    """Give (index, number of blocks) of the outermost stack that `path` lies in; (None, 0) outside any."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and ".".join(parts[:i]) in lists:
            return int(part), lists[".".join(parts[:i])]
    return None, 0


def _unmatched(
    what: str, entries: list[str], names: Iterable[str], model: nn.Module, matched: Sequence[str] = ()
) -> UsageError:
    names, first = list(names), entries[:SHOWN]
    leaves = sorted({name.rpartition(".")[2] for name in names} - {""})
    leaves = [leaf for leaf in leaves if not leaf.isdigit()] or leaves
    near = [n for e in first for n in difflib.get_close_matches(e.rpartition(".")[2][:100], leaves, n=1, cutoff=0.5)]
    listed = " ".join(leaves[:30]) + (" ..." if len(leaves) > 30 else "")
    counts = ", ".join(f"{e!r} matched {sum(is_suffix(e, n) for n in names)}" for e in matched[:SHOWN])
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return UsageError(
        f"{what}: {', '.join(repr(e[:100]) for e in first)}{more} matches no layer of {type(model).__name__}",
        why=counts or None,
        fix=(f"did you mean {', '.join(map(repr, near))}? " if near else "") + f"names here end in: {listed}",
    )
