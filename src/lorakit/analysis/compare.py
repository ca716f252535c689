"""Two or more adapters of one base: which directions they share beyond chance, and whether they add up or cancel.

Compared are the singular vectors of ΔW, left (what is written) and right (what is read): A alone depends on the factors chosen.

    φ(i) = ||U1_i^T U2_i||_F^2 / i     of the i leading directions; random: i/n
    replicated                         directions in common beyond chance, the smaller of left and right
    interference                       <ΔW1, ΔW2> / (||ΔW1|| ||ΔW2||); random: 0 ± 1/sqrt(d k)

Over runs that differ in their seed only, the replicated rank is how many directions the data support; over tasks, interference
says what merging the two would cancel.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor

from ..core.errors import CheckError, FileError, UsageError
from ..theory import spectrum as sp
from ..theory import subspace
from ..theory.number import Kind, Number
from ..theory.replication import Replicated, replicated
from ..theory.spectrum import Factored
from .base_weights import BaseWeights
from .loaded import LoadedAdapter, LoadedModule

CURVE = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of leading directions that φ is given for."""


@dataclass(frozen=True)
class PairModule:
    """One module of two adapters. `curves`: side -> i -> φ(i); `cosines`: side -> principal cosines, descending."""

    path: str
    ranks: tuple[int, int]
    numbers: Mapping[str, Number]
    curves: Mapping[str, Mapping[int, Number]]
    cosines: Mapping[str, tuple[float, ...]]
    weights: tuple[float, float, float]
    """<ΔW1, ΔW2>, ||ΔW1||^2 and ||ΔW2||^2."""

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        return {
            "path": self.path,
            "ranks": list(self.ranks),
            "numbers": {name: number.json() for name, number in self.numbers.items()},
            "phi": {side: {i: n.json() for i, n in curve.items()} for side, curve in self.curves.items()},
            "principal_cosines": {side: list(values) for side, values in self.cosines.items()},
        }


@dataclass(frozen=True)
class Pair:
    """Two adapters on the modules that both change; `first`, `second` index the names of the comparison."""

    first: int
    second: int
    modules: tuple[PairModule, ...]
    numbers: Mapping[str, Number]

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        return {
            "first": self.first,
            "second": self.second,
            "numbers": {name: number.json() for name, number in self.numbers.items()},
            "modules": [module.json() for module in self.modules],
        }


@dataclass(frozen=True)
class Comparison:
    """Every pair of the adapters, in their order."""

    names: tuple[str, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        return {
            "adapters": list(self.names),
            "pairs": [pair.json() for pair in self.pairs],
            "notes": list(self.notes),
        }


def compare(adapters: Sequence[LoadedAdapter], names: Sequence[str], base: BaseWeights | None = None) -> Comparison:
    """Compare adapters pair by pair. base: for methods whose change depends on W.

    Raises UsageError for fewer than two, for nothing in common and for a needed base that is missing, CheckError for an adapter
    that changes nothing, FileError for shapes of different bases.
    """
    if len(adapters) < 2:
        raise UsageError("there is nothing to compare", fix="give two adapters or more")
    changes = [_changes(adapter, base) for adapter in adapters]
    idle = [name for name, change in zip(names, changes, strict=True) if not change]
    if idle:
        raise CheckError(f"{', '.join(idle)}: the adapter changes no weight", fix="train it, or leave it out")
    pairs, notes = [], []
    for a, b in combinations(range(len(adapters)), 2):
        common = [path for path in changes[a] if path in changes[b]]
        alone = len(changes[a]) + len(changes[b]) - 2 * len(common)
        if not common:
            raise UsageError(
                f"{names[a]} and {names[b]} change no module in common", fix="compare adapters of the same base"
            )
        if alone:
            notes.append(f"{names[a]} and {names[b]}: {alone} modules are changed by one of them only")
        made = tuple(_module(path, changes[a][path], changes[b][path]) for path in common)
        pairs.append(Pair(a, b, made, _whole(made)))
    return Comparison(tuple(names), tuple(pairs), tuple(notes))


def _changes(adapter: LoadedAdapter, base: BaseWeights | None) -> dict[str, Factored]:
    """Give U, S, V of every changed matrix by path, without what is numerically zero; modules that do nothing are left out."""
    needing = [m.path for m in adapter if m.needs_base]
    if needing and base is None:
        raise UsageError(
            f"what a {adapter.method} adapter changes depends on the base weights",
            why=f"{len(needing)} modules, {needing[0]} first",
            fix="--base MODEL",
        )
    found = {}
    for module in (m for m in adapter if m.changes_matrix):
        delta = module.factored(_weight(module, base))
        q = sp.numerical_rank(delta.S, *module.shape)
        if q:
            found[module.path] = Factored(delta.U[:, :q], delta.S[:q], delta.V[:, :q])
    return found


def _weight(module: LoadedModule, base: BaseWeights | None) -> Tensor | None:
    return base.matrix(module) if base is not None and module.needs_base else None


def _module(path: str, one: Factored, other: Factored) -> PairModule:
    if len(one.U) != len(other.U) or len(one.V) != len(other.V):
        shapes = [[len(delta.U), len(delta.V)] for delta in (one, other)]
        raise FileError(f"{path} is {shapes[0]} in one adapter and {shapes[1]} in another: they are of different bases")
    d, k = len(one.U), len(one.V)
    sides = {"left": (one.U, other.U), "right": (one.V, other.V)}
    shared = {side: replicated(*pair) for side, pair in sides.items()}
    numbers = {f"phi_{side}": _phi(U1, U2) for side, (U1, U2) in sides.items()}
    numbers |= {f"replicated_{side}": _count(found) for side, found in shared.items()}
    least = min(shared.values(), key=lambda found: found.count)
    cosine = subspace.cosine(one, other)
    numbers["replicated"] = _count(least)
    numbers["interference"] = Number(cosine, Kind.EXACT, "interference", 0.0, inputs={"null_sd": 1 / math.sqrt(d * k)})
    curves = {side: _curve(*pair) for side, pair in sides.items()}
    cosines = {side: tuple(found.cosines.tolist()) for side, found in shared.items()}
    sizes = sp.frobenius(one.S), sp.frobenius(other.S)
    energies = (cosine * sizes[0] * sizes[1], sizes[0] ** 2, sizes[1] ** 2)
    return PairModule(path, (len(one.S), len(other.S)), numbers, curves, cosines, energies)


def _phi(U1: Tensor, U2: Tensor) -> Number:
    found = subspace.similarity(U1, U2)
    inputs = {"n": len(U1), "i": U1.shape[1], "j": U2.shape[1], "null_sd": found.null_sd}
    return Number(found.phi, Kind.EXACT, "subspace_similarity", found.null, inputs=inputs)


def _curve(U1: Tensor, U2: Tensor) -> dict[int, Number]:
    most = min(U1.shape[1], U2.shape[1])
    return {i: _phi(U1[:, :i], U2[:, :i]) for i in sorted({*(i for i in CURVE if i < most), most})}


def _count(found: Replicated) -> Number:
    inputs = {"of": len(found.cosines), "squared_cosine_by_chance": found.edge}
    return Number(float(found.count), Kind.EXACT, "replicated_rank", 0.0, inputs=inputs)


def _whole(modules: Sequence[PairModule]) -> dict[str, Number]:
    """Give means over the modules, and the interference of the whole changes."""
    found: dict[str, Number] = {}
    for name in ("phi_left", "phi_right", "replicated"):
        its = [m.numbers[name] for m in modules]
        mean, null = (sum(values) / len(its) for values in ([n.value for n in its], [n.null or 0.0 for n in its]))
        found[name] = Number(mean, its[0].kind, its[0].formula, null, inputs={"modules": len(its)})
    inner, one, other = (math.fsum(m.weights[i] for m in modules) for i in range(3))
    found["interference"] = Number(inner / math.sqrt(one * other), Kind.EXACT, "interference", 0.0)
    return found


def over_pairs(found: Comparison, name: str) -> dict[str, float]:
    """Give the mean of a number over the pairs, by module path."""
    values: dict[str, list[float]] = {}
    for path, value in _values(found, name):
        values.setdefault(path, []).append(value)
    return {path: sum(its) / len(its) for path, its in values.items()}


def _values(found: Comparison, name: str) -> Iterator[tuple[str, float]]:
    for pair in found.pairs:
        yield from ((module.path, module.numbers[name].value) for module in pair.modules)
