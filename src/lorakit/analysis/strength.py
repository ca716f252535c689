"""How strong an adapter should be: its loss at several strengths, what the base loses by it, and which modules it is about.

    L(γ), KL(base || adapted at γ)     γ in {0, .25, .5, .75, 1, 1.25}, where ΔW is replaced by γ ΔW, on held-out rows
    dL/dγ of each module at γ = 1      = <A, dL/dA> = <B, dL/dB>, exactly, from one backward pass

A positive slope on rows that were not trained on means that less would be better there: the adapter is overfitted, or its alpha
or rate is too high. The slope is local; the sweep says how far. Forgetting is measured as KL, not as a norm: on seven runs the
norm of ΔW put them in the wrong order and KL in the right one.
"""

import math
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attach import disabled
from ..core.errors import CheckError
from ..core.scaling import GAMMAS, Scaled, leaves, scalable, set_strength, slopes, trained_in_full
from ..models.modes import evaluating
from ..theory import gradients, retention, strength
from ..theory.judgement import Judgement
from ..theory.number import Kind as NumberKind
from ..theory.number import Number
from .rowwise import Predictions, Rows


@dataclass(frozen=True)
class Sweep:
    """One data set at every strength. Sums over the predictions of each row, (n,) each; `base`, `kl` None: not measured."""

    weights: Tensor
    nll: Mapping[float, Tensor]
    kl: Mapping[float, Tensor] | None
    base: Tensor | None
    seconds: float

    def losses(self) -> dict[float, Number]:
        """Give the mean loss at each strength; its null is the base model's."""
        return self._means(self.nll, "loss", None if self.base is None else self.mean(self.base))

    def kls(self) -> dict[float, Number] | None:
        """Give KL(base || adapted) at each strength in nats a token."""
        return None if self.kl is None else self._means(self.kl, "kl", 0.0)

    def mean(self, sums: Tensor) -> float:
        """Give the mean over all predictions."""
        return float(sums.sum() / self.weights.sum())

    def best(self) -> Number:
        """Give γ*, with its interval over rows. Its null, an adapter that is right as it is, is 1."""
        grid = sorted(self.nll)
        means = [self.mean(self.nll[g]) for g in grid]
        draws = strength.resampled(torch.stack([self.nll[g] for g in grid], 1), self.weights)
        values = torch.tensor([strength.best_strength(grid, row) for row in draws.tolist()])
        value = strength.best_strength(grid, means)
        return self._number(value, "best_strength", 1.0, strength.interval(values))

    def gain(self, gamma: float, other: float = 0.0) -> Number:
        """Give L(other) - L(gamma), paired over rows."""
        return self._difference(self.nll[other], self.nll[gamma], "strength_gain")

    def over_base(self, gamma: float) -> Number | None:
        """Give L(gamma) - L(base), paired over rows: what the rows lose by the adapter."""
        return None if self.base is None else self._difference(self.nll[gamma], self.base, "strength_gain")

    def _difference(self, a: Tensor, b: Tensor, formula: str) -> Number:
        draws = strength.resampled((a - b)[:, None], self.weights)[:, 0]
        return self._number(self.mean(a - b), formula, 0.0, strength.interval(draws))

    def _means(self, sums: Mapping[float, Tensor], formula: str, null: float | None) -> dict[float, Number]:
        grid = sorted(sums)
        draws = strength.resampled(torch.stack([sums[g] for g in grid], 1), self.weights)
        return {
            g: self._number(self.mean(sums[g]), formula, null, strength.interval(draws[:, i]))
            for i, g in enumerate(grid)
        }

    def _number(self, value: float, formula: str, null: float | None, interval: tuple[float, float]) -> Number:
        return Number(value, NumberKind.ESTIMATE, formula, null, interval, len(self.weights))


class Slope(NamedTuple):
    """dL/dγ of one module. `value` comes from γ itself; <A, dA> and <B, dB>, where there are factors, must agree with it."""

    value: Number
    by_A: float
    by_B: float
    kl: Number | None
    """dKL/dγ on the rows that are to be retained."""

    def json(self) -> dict[str, Any]:
        """Give it for machines."""
        other = None if self.kl is None else self.kl.json()
        return {"slope": self.value.json(), "by_A": _finite(self.by_A), "by_B": _finite(self.by_B), "kl_slope": other}


@dataclass(frozen=True)
class Strength:
    """All of it."""

    task: Sweep
    retain: Sweep | None
    slopes: Mapping[str, Slope]
    slope: Number
    """Of all modules together, with its interval over rows."""
    mismatch: float
    """Largest relative difference of <A, dA> and <B, dB> over the modules with factors; NaN if none has."""
    kept: Sequence[str]
    """Modules trained in full, which γ leaves as they are."""
    judgements: Sequence[Judgement] = ()
    not_measured: Mapping[str, str] = field(default_factory=dict)

    def elasticity(self) -> Number:
        """Give by what share of itself the gain grows with γ; its interval is that of the slope. NaN without a gain."""
        gain = self.task.gain(1.0).value
        low, high = self.slope.interval or (self.slope.value, self.slope.value)
        value, ends = strength.elasticity(self.slope.value, gain), [strength.elasticity(s, gain) for s in (high, low)]
        return Number(value, NumberKind.ESTIMATE, "elasticity", 0.0, (ends[0], ends[1]), self.slope.n)


def measure(model: nn.Module, name: str, task: Rows, retain: Rows | None, gammas: Sequence[float] = GAMMAS) -> Strength:
    """Measure adapter `name` on held-out rows of its task and on rows that are to be retained.

    The model is left as it was, also after an error. Raises UsageError for a method whose change cannot be scaled, CheckError
    if the model at γ = 0 is not the base model.
    """
    kept = trained_in_full(model, name)
    gammas = sorted({0.0, 1.0, *gammas})
    with evaluating(model), scalable(model, name) as strengths:
        on_task = sweep(model, strengths, task, gammas, whole=not kept)
        on_retain = None if retain is None else sweep(model, strengths, retain, gammas, whole=not kept)
        found = attributed(model, strengths, task, retain)
    missing = {} if retain is not None else {"retention": "no rows to retain were given: --retain R"}
    if task.classes:
        missing["KL to the base"] = "the base model has no trained head for these classes"
    return Strength(on_task, on_retain, found.slopes, found.total, found.mismatch, kept, (), missing)


@torch.no_grad()
def sweep(
    model: nn.Module, strengths: Mapping[str, Scaled], rows: Rows, gammas: Sequence[float], *, whole: bool
) -> Sweep:
    """Run all rows at every strength, and as the base model does, if it has a head for them.

    whole: nothing but the scaled changes was trained, so γ = 0 is the base model. Then its numbers are the base's, and the
    first batch proves it.
    """
    start, n = time.perf_counter(), len(rows)
    nll = {gamma: torch.zeros(n, dtype=torch.float64) for gamma in gammas}
    kl = {gamma: torch.zeros(n, dtype=torch.float64) for gamma in gammas}
    base = torch.zeros(n, dtype=torch.float64)
    for batch_number, batch in enumerate(rows.batches()):
        with disabled(model):
            reference = rows.predict(batch)
        base[batch] = _sums(reference, reference.losses(), len(batch))
        for gamma in gammas:
            if gamma == 0 and whole and batch_number:
                nll[gamma][batch] = base[batch]
                continue
            set_strength(strengths, gamma)
            found = rows.predict(batch)
            if gamma == 0 and whole:
                _require_base(found.logits, reference.logits)
            nll[gamma][batch] = _sums(found, found.losses(), len(batch))
            if not rows.classes:
                kl[gamma][batch] = _sums(found, retention.kl(reference.logits, found.logits), len(batch))
    set_strength(strengths, 1.0)
    seconds = time.perf_counter() - start
    return Sweep(rows.weights(), nll, None if rows.classes else kl, None if rows.classes else base, seconds)


def _require_base(logits: Tensor, base: Tensor) -> None:
    if not torch.equal(logits, base):
        raise CheckError(
            "at strength 0 the model is not its base model",
            why=f"logits differ by up to {float((logits - base).abs().max()):.3g}: something else than the adapter is active",
        )


def _sums(found: Predictions, values: Tensor, count: int) -> Tensor:
    return found.by_row(values, count).cpu()


# --- the slope of each module -----------------------------------------------------------------------------------------------


class Attributed(NamedTuple):
    """The slopes by module, their sum over all modules with its interval, and the self-check."""

    slopes: dict[str, Slope]
    total: Number
    mismatch: float


def attributed(model: nn.Module, strengths: Mapping[str, Scaled], task: Rows, retain: Rows | None) -> Attributed:
    """Give dL/dγ of each module on the task and, of KL, on the rows to retain. One row a pass, so that rows stay apart."""
    pairs = {path: _pair(scaled) for path, scaled in strengths.items()}
    by_row, factors = _slopes(strengths, task, [p for pair in pairs.values() if pair for p in pair], _loss)
    to_retain = None
    if retain is not None and not retain.classes:
        to_retain, _ = _slopes(strengths, retain, [], _divergence)
    dropped = iter(factors)
    found: dict[str, Slope] = {}
    worst = [math.nan]
    for i, (path, pair) in enumerate(pairs.items()):
        by_A = by_B = math.nan
        if pair is not None:
            (A, B), dA, dB = pair, next(dropped), next(dropped)
            by_A, by_B = float((A.detach() * dA).sum()), float((B.detach() * dB).sum())
            worst.append(gradients.scale_derivative(A, dA, B, dB).mismatch)
        exact = Number(float(by_row[:, i].sum()), NumberKind.EXACT, "scale_derivative", 0.0, n=len(task))
        forgets = None
        if to_retain is not None:
            forgets = Number(float(to_retain[:, i].sum()), NumberKind.EXACT, "scale_derivative", 0.0, n=len(to_retain))
        found[path] = Slope(exact, by_A, by_B, forgets)
    mismatch = max((w for w in worst if not math.isnan(w)), default=math.nan)
    weights = task.weights()
    sums = by_row.sum(1) * weights.sum()  # of each row, as the loss of a row is
    draws = strength.resampled(sums[:, None], weights)[:, 0]
    value = float(by_row.sum())
    total = Number(value, NumberKind.EXACT, "scale_derivative", 0.0, strength.interval(draws), len(task))
    return Attributed(found, total, mismatch)


def _slopes(
    strengths: Mapping[str, Scaled], rows: Rows, factors: Sequence[nn.Parameter], loss: Any
) -> tuple[Tensor, list[Tensor]]:
    """Give each row's share (n, modules) of the gradient of the mean loss by γ, and the gradient of the mean by the factors."""
    weight = float(rows.weights().sum())
    found = torch.zeros(len(rows), len(strengths), dtype=torch.float64)
    sums = [torch.zeros_like(p) for p in factors]
    with leaves(strengths) as gammas, _learning(factors), torch.enable_grad():
        for i in range(len(rows)):
            value = loss(rows, i) / weight
            by_gamma, by_factor = slopes(value, gammas, list(factors))
            found[i] = by_gamma.detach().double().cpu()
            for total, own in zip(sums, by_factor, strict=True):
                if own is not None:
                    total += own
    return found, sums


def _loss(rows: Rows, i: int) -> Tensor:
    return rows.predict([i]).losses().sum()


def _divergence(rows: Rows, i: int) -> Tensor:
    """Give KL(base || adapted), summed over the predictions of a row, with its gradient."""
    with torch.no_grad(), disabled(rows.model):
        base = rows.predict([i]).logits
    adapted = rows.predict([i]).logits
    p, q = (t.to(torch.promote_types(t.dtype, torch.float32)).log_softmax(-1) for t in (base, adapted))
    return F.kl_div(q, p, reduction="sum", log_target=True)


def _pair(scaled: Scaled) -> tuple[nn.Parameter, nn.Parameter] | None:
    """Give A and B of a change that is s·B·A and nothing else, so that <A, dA> = <B, dB> = dL/dγ."""
    roles = {role: name for name, role in scaled.own.roles().items()}
    if set(roles) != {"A", "B"} or len(scaled.own.roles()) != 2:
        return None
    A, B = (scaled.own.get_parameter(roles[role]) for role in ("A", "B"))
    return (A, B) if A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] else None


@contextmanager
def _learning(parameters: Sequence[nn.Parameter]) -> Generator[None]:
    """Let parameters have gradients for a while."""
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, was in zip(parameters, before, strict=True):
            p.requires_grad_(was)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
