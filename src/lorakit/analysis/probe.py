"""What the gradient of the base model says about an adapter that is not there yet: by module and rank, without a weight gradient.

Two halves of the rows. Pass 1 keeps, of the mean gradient G (out, in) of each half and module, two thin products

    Y = G Ω (out, p + m)        Z = G^T Ψ (in, l)        G = sum over tokens of g x^T, from hooks on x and on the output's g

which give Ĝ = Q (Ψ^T Q)^+ Z^T of rank p, Q a basis of Y's first p columns (Tropp et al. 2017), and its singular triplets s, u, v.
Pass 2 lets each row of the other half say what it thinks of them:

    cross_i = u_i^T G_t v_i       signal = <G, G_t> = <Ĝ, G_t> + <(G - Ĝ) Ω', G_t Ω'> / m

Both are unbiased whatever Ĝ is: the second term, from m fresh directions Ω', is what the sketch has missed. So directions found
on one half are scored by the other, and the noise of neither counts as signal. Nothing of the size of a weight is kept, weights
need no gradient and may be stored in 4 bits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..core.calibrate import watched
from ..core.errors import DivergenceError, UsageError
from ..core.fused import parts
from ..core.kinds import Kind, require_kind
from ..core.target import Target, sites
from .rowwise import Rows

TOP = 64
"""Singular directions of each half's gradient that are followed."""
FRESH = 16
"""Directions for what the sketch has missed."""


class Place(NamedTuple):
    """A matrix that could carry an adapter: a layer's, or that of one part of a fused layer (`rows` of it)."""

    name: str
    path: str
    rows: Tensor | None
    shape: tuple[int, int]


@dataclass(frozen=True)
class Module:
    """What was found about one matrix. n rows, each scored by the directions of the other half."""

    place: Place
    captured: Tensor
    """(n, top), cumulated: what of <G, G_t> rank q = 1 ... top would follow."""
    signal: Tensor
    """(n,) <G, G_t>; its mean estimates ||mean gradient||^2."""
    squares: Tensor
    """(n,) estimates of ||G_t||^2."""
    weight_norm: float
    """||W||_F."""

    def at(self, rank: int) -> Tensor:
        """Give the column of a rank; beyond the last one it is the last one."""
        return self.captured[:, min(rank, self.captured.shape[1]) - 1]

    @property
    def parameters(self) -> int:
        """Trained numbers of rank 1."""
        return sum(self.place.shape)


@dataclass(frozen=True)
class Probe:
    """All modules. half: (n,) 0 or 1. loss: mean of the base model over trained tokens."""

    modules: Sequence[Module]
    half: Tensor
    loss: float
    tokens: int


def places(model: nn.Module, target: Target) -> list[Place]:
    """Give the matrices of the targeted layers, those of known fused layers part by part. Raises UsageError for one-hot inputs."""
    found = []
    for site in sites(model, target):
        shape = require_kind(site.path, site.layer).shape(cast(Kind, site.layer))
        if shape.one_hot:
            raise UsageError(f"{site.path}: an embedding cannot be probed", fix="leave it out of the targets")
        own = parts(model, site.path, shape.out_features, target.fused) if site.part is None else {}
        if own:
            found += [
                Place(f"{site.path}.{p}", site.path, rows, (len(rows), shape.in_features)) for p, rows in own.items()
            ]
        else:
            out = shape.out_features if site.rows is None else len(site.rows)
            found.append(Place(site.name, site.path, site.rows, (out, shape.in_features)))
    return found


def probe(
    model: nn.Module,
    chosen: Sequence[Place],
    rows: Rows,
    *,
    top: int = TOP,
    seed: int = 0,
    tick: Callable[[int, int], None] = lambda done, of: None,
) -> Probe:
    """Run all rows twice, forward and backward, one at a time. tick: called after each with (rows done, rows in all).

    Raises UsageError for fewer than four rows and for modules that the rows never reach, DivergenceError for NaN or infinity.
    """
    n = len(rows)
    if n < 4:
        raise UsageError(
            f"{n} rows cannot be split into two halves that say anything", fix="give at least 4, better 64"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    half = torch.zeros(n, dtype=torch.long)
    half[order[: n // 2]] = 1
    scale = float(rows.weights().mean())
    layers = {place.path: model.get_submodule(place.path) for place in chosen}
    first = {place.name: _Sketch(place, layers[place.path], top, seed + i) for i, place in enumerate(chosen)}
    losses, done = [0.0] * n, 0
    for i, loss in _gradients(model, layers, first, chosen, rows, range(n), scale):
        losses[i] = loss
        for sketch in first.values():
            sketch.finish(int(half[i]))
        done += 1
        tick(done, 2 * n)
    _require_finite(first)
    sizes = {name: sketch.p for name, sketch in first.items()}
    found = {name: _Found(torch.zeros(n, p).double(), torch.zeros(n).double()) for name, p in sizes.items()}
    for by in (0, 1):
        others = [i for i in range(n) if int(half[i]) != by]
        second = {name: _Scores(sketch, by, n - len(others)) for name, sketch in first.items()}
        for i, _ in _gradients(model, layers, second, chosen, rows, others, scale):
            for name, scores in second.items():
                found[name].captured[i], found[name].signal[i] = scores.finish()
            done += 1
            tick(done, 2 * n)
    modules = [
        Module(p, *found[p.name], torch.stack(first[p.name].squares).cpu(), _norm(layers[p.path], p)) for p in chosen
    ]
    weights = rows.weights()
    return Probe(modules, half, sum(losses) / float(weights.sum()), int(weights.sum()))


class _Found(NamedTuple):
    """What all rows say of one matrix: captured (n, p), signal (n,)."""

    captured: Tensor
    signal: Tensor


def _gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    seeing: "Mapping[str, _Sketch | _Scores]",
    chosen: Sequence[Place],
    rows: Rows,
    indices: Sequence[int],
    scale: float,
) -> Iterator[tuple[int, float]]:
    """Run rows with their gradients, which the matrices see; give (row, its summed loss)."""
    watchers = {path: _Layer([seeing[p.name] for p in chosen if p.path == path]) for path in layers}
    with watched(model, layers, watchers) as root, torch.enable_grad():
        for i in indices:
            loss = rows.predict([i]).losses().sum()
            (loss / scale).backward(inputs=[root])
            yield i, float(loss.detach())


class _Layer:
    """Hands what a layer's hook sees to the matrices on it."""

    def __init__(self, members: "Sequence[_Sketch | _Scores]") -> None:
        self.members = members

    def see(self, root: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """Tie the output to `root`, and wait for its gradient."""
        x = (*args, *kwargs.values())[0].detach()
        y = y + root.to(y.dtype)
        y.register_hook(partial(self._gradient, layer, x))
        return y

    @torch.no_grad()
    def _gradient(self, layer: nn.Module, x: Tensor, g: Tensor) -> None:
        kind = require_kind("", layer)
        inputs = kind.input_rows(cast(Kind, layer), x).float()
        outputs = kind.output_rows(cast(Kind, layer), g).float()
        for member in self.members:
            rows = member.place.rows
            member.take(inputs, outputs if rows is None else outputs[:, rows.to(outputs.device)])


class _Sketch:
    """Pass 1 of one matrix: the sketches of both halves, and the size of each row's gradient."""

    def __init__(self, place: Place, layer: nn.Module, top: int, seed: int) -> None:
        self.place = place
        out, width = place.shape
        device = cast(Kind, layer).weight.device
        self.p = min(top, out, width)
        self.inner = _directions(width, self.p, seed, device), _directions(width, min(FRESH, width), -seed - 1, device)
        self.outer = _directions(out, min(2 * self.p + 1, out), seed + 7919, device)
        self.right = torch.cat(self.inner, 1)
        self.Y = torch.zeros(2, out, self.right.shape[1], device=device)
        self.Z = torch.zeros(2, width, self.outer.shape[1], device=device)
        self.squares: list[Tensor] = []
        self._row = torch.zeros(out, self.right.shape[1], device=device), torch.zeros_like(self.Z[0])
        self.calls = 0

    def take(self, x: Tensor, g: Tensor) -> None:
        """Add one call's part of the row's gradient."""
        self._row[0].addmm_(g.T, x @ self.right)
        self._row[1].addmm_(x.T, g @ self.outer)
        self.calls += 1

    def finish(self, half: int) -> None:
        """Add the row to its half."""
        Y, Z = self._row
        self.Y[half] += Y
        self.Z[half] += Z
        self.squares.append(Y.double().square().sum() / self.right.shape[1])
        Y.zero_()
        Z.zero_()


class _Scores:
    """Pass 2 of one matrix: what rows of one half say of the directions of the other."""

    def __init__(self, sketch: _Sketch, half: int, count: int) -> None:
        self.place, self.fresh = sketch.place, sketch.inner[1]
        self.s, self.U, self.V, self.missed = _triplets(sketch, half, count)
        self._cross = torch.zeros_like(self.s)
        self._rest = torch.zeros_like(self.s[0])

    def take(self, x: Tensor, g: Tensor) -> None:
        """Add one call's part of the row's products."""
        self._cross += self.s * ((g @ self.U) * (x @ self.V)).sum(0)
        self._rest += ((g @ self.missed) * (x @ self.fresh)).sum() / self.fresh.shape[1]

    def finish(self) -> tuple[Tensor, Tensor]:
        """Give the row's numbers: captured (p,), signal ()."""
        captured = self._cross.cumsum(0)
        signal = captured[-1] + self._rest
        self._cross, self._rest = torch.zeros_like(self.s), torch.zeros_like(self.s[0])
        return captured, signal


def _triplets(sketch: _Sketch, half: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give s (p,), U (out, p), V (in, p) of Ĝ, the mean gradient of a half as far as the sketch knows it, and (G - Ĝ) Ω'."""
    Y, Z = sketch.Y[half].double() / count, sketch.Z[half].double() / count
    Q, _ = torch.linalg.qr(Y[:, : sketch.p])
    X = torch.linalg.lstsq(sketch.outer.double().T @ Q, Z.T).solution  # Ĝ = Q X
    P, R = torch.linalg.qr(X.T)
    u, s, vh = torch.linalg.svd(R.T)
    U, V = Q @ u, P @ vh.T
    missed = Y[:, sketch.p :] - Q @ (X @ sketch.inner[1].double())
    return s, U.float(), V.float(), missed.float()


def _directions(n: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Draw `count` orthogonal directions of n of length sqrt(n): the mean of their outer products is the identity."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    Q, _ = torch.linalg.qr(torch.randn(n, count, generator=generator))
    return (Q * n**0.5).to(device)


def _norm(layer: nn.Module, place: Place) -> float:
    """Give ||W||_F."""
    W = require_kind(place.path, layer).matrix(cast(Kind, layer))
    W = W if place.rows is None else W[place.rows.to(W.device)]
    return float(torch.linalg.vector_norm(W, dtype=torch.promote_types(W.dtype, torch.float32)))


def _require_finite(sketches: Mapping[str, _Sketch]) -> None:
    idle = [name for name, sketch in sketches.items() if not sketch.calls]
    if idle:
        raise UsageError(f"{len(idle)} modules take no part in the loss: {', '.join(idle[:5])}", fix="leave them out")
    broken = [name for name, sketch in sketches.items() if not bool(sketch.Y.isfinite().all())]
    if broken:
        raise DivergenceError(f"the gradients of {', '.join(broken[:5])} hold NaN or infinity", fix="take float32")
