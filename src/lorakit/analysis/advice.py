"""Rank and layers before training: what share of the reproducible gradient a rank would follow, and where numbers are best spent.

Everything is about the gradient of the base model, before the first step: later directions may differ. The share is right as a
share of that gradient (an estimate with a band); that it goes with the gain of training is a heuristic, seen on small models.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..theory import coding, gain, gradients, probe, strength
from ..theory.number import Kind, Number
from ..theory.thresholds import BITS_PER_PARAMETER, CAPTURED, FIRST_UPDATE, INERT_UPDATE, LIKELY_RANKS
from .probe import Module, Probe

CHOICES: Mapping[str, tuple[str, ...]] = {
    "q": ("q",),
    "v": ("v",),
    "q + v": ("q", "v"),
    "q, k, v, o": ("q", "k", "v", "o"),
}
"""The choices of table 5 of the LoRA paper (Hu et al. 2021); all layers come on top."""
NAMES: Mapping[str, str] = {
    "q": r"\.(q|q_proj|query|q_lin|wq|to_q|query_proj)$",
    "k": r"\.(k|k_proj|key|k_lin|wk|to_k|key_proj)$",
    "v": r"\.(v|v_proj|value|v_lin|wv|to_v|value_proj)$",
    "o": r"(attn|attention)\.(\w+\.)*(o|o_proj|out_proj|c_proj|dense|out_lin|wo|to_out)$",
}
RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
ALPHA_OVER_R = 2


class Choice(NamedTuple):
    """One way to spend the budget. rank 0: not even rank 1 fits. share: of the reproducible gradient of all modules."""

    name: str
    modules: Sequence[Module]
    rank: int
    parameters: int
    share: Number | None


class FirstStep(NamedTuple):
    """||ΔW_1|| / ||W|| by Adam's first step, its median over the modules."""

    lr: float
    r: int
    alpha: float
    rho: float

    @property
    def remark(self) -> str:
        """Say what is unusual about it."""
        return "too hot" if self.rho > FIRST_UPDATE.value else "inert" if self.rho < INERT_UPDATE.value else ""


@dataclass(frozen=True)
class Advice:
    """All of it. `rank` None: no rank that was looked at follows enough of the gradient, or there is no signal."""

    probe: Probe
    curve: Mapping[int, Number]
    """Share of the reproducible gradient by rank, all modules with that rank."""
    rank: int | None
    band: tuple[int | None, int | None]
    """The ranks that the ends of the curve's band would advise."""
    signal: Number
    silent: Sequence[str]
    """Modules whose signal cannot be told from zero."""
    shares: Mapping[str, Number]
    """By module: its share of the signal of all."""
    budget: int
    choices: Sequence[Choice]
    first_steps: Sequence[FirstStep]
    noise: gain.NoiseScale
    capacity: Number
    bits: Number
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def used(self) -> int:
        """Give the rank to write down."""
        return self.rank or 8

    @property
    def best(self) -> Choice:
        """Give the choice that follows most of the gradient at the budget."""
        return max(self.choices, key=lambda c: c.share.value if c.share is not None else -math.inf)


def advise(found: Probe, budget: int | None = None, tokens: int | None = None) -> Advice:
    """Turn a probe into advice.

    budget: trained numbers to spend; those of the advised rank on all layers if not given. tokens: trained tokens of all the
    data, of which the probe may have seen a part.
    """
    modules = found.modules
    curve = {r: share(found, modules, [r] * len(modules)) for r in _ranks(modules)}
    rank = smallest({r: c.value for r, c in curve.items()})
    band = tuple(smallest({r: (c.interval or (c.value,) * 2)[end] for r, c in curve.items()}) for end in (1, 0))
    signal = total_signal(found)
    alive = signal.interval is not None and signal.interval[0] > 0
    rank = rank if alive else None
    each = {m.place.name: _signal_interval(m.signal, found.half) for m in modules}
    silent = [name for name, (low, _) in each.items() if not low > 0]
    whole = signal.value
    shares = {
        m.place.name: Number(
            float(m.signal.mean()) / whole,
            Kind.ESTIMATE,
            "gradient_capture",
            0.0,
            (each[m.place.name][0] / whole, each[m.place.name][1] / whole),
            len(m.signal),
        )
        for m in modules
    }
    spend = budget or sum(m.parameters for m in modules) * (rank or 8)
    r = rank or 8
    return Advice(
        found,
        curve,
        rank,
        (band[0], band[1]),
        signal,
        silent,
        shares,
        spend,
        [spent(found, name, own, spend) for name, own in choices(modules).items()],
        first_steps(modules, r),
        _noise(found),
        _capacity(modules, r, tokens or found.tokens),
        _bits(found, modules, r, tokens or found.tokens),
        () if alive else ("no reproducible gradient at this number of rows: give more (--rows)",),
    )


# --- the curve -------------------------------------------------------------------------------------------------------------


def share(found: Probe, modules: Sequence[Module], ranks: Sequence[int]) -> Number:
    """Give what share of the reproducible gradient of all modules of the probe these, at these ranks, would follow."""
    captured = torch.stack([m.at(r) for m, r in zip(modules, ranks, strict=True)]).sum(0)
    signal = torch.stack([m.signal for m in found.modules]).sum(0)
    value = _halves(captured, found.half) / _halves(signal, found.half)
    n = len(signal)
    draws = _draws(torch.stack([captured, signal], 1), found.half)
    ratios = torch.where(draws[:, 1] > 0, draws[:, 0] / draws[:, 1], torch.zeros(len(draws), dtype=torch.float64))
    null = sum(_random_capture(m, r) * float(m.signal.mean()) for m, r in zip(modules, ranks, strict=True))
    return Number(value, Kind.ESTIMATE, "gradient_capture", null / float(signal.mean()), strength.interval(ratios), n)


def _random_capture(module: Module, r: int) -> float:
    """Give what share of a gradient random factors of rank r could follow together: 1 - (1 - r/d)(1 - r/k)."""
    d, k = module.place.shape
    return 1 - (1 - min(r, d) / d) * (1 - min(r, k) / k)


def smallest(curve: Mapping[int, float]) -> int | None:
    """Give the least rank that follows enough, None if none does."""
    return next((r for r in sorted(curve) if curve[r] >= CAPTURED), None)


def total_signal(found: Probe) -> Number:
    """Give ||mean gradient||^2 over all modules, unbiased; its null is 0."""
    signal = torch.stack([m.signal for m in found.modules]).sum(0)
    return Number(
        _halves(signal, found.half),
        Kind.ESTIMATE,
        "gradient_capture",
        0.0,
        _signal_interval(signal, found.half),
        len(signal),
    )


def _ranks(modules: Sequence[Module]) -> list[int]:
    most = max(m.captured.shape[1] for m in modules)
    return [r for r in LIKELY_RANKS if r <= most]


def _halves(values: Tensor, half: Tensor) -> float:
    """Give the mean of the two halves' means."""
    return float((values[half == 0].mean() + values[half == 1].mean()) / 2)


def _draws(columns: Tensor, half: Tensor) -> Tensor:
    """Resample the rows of each half by itself: (draws, m) means of the two halves' means."""
    each = [strength.resampled(columns[half == h], torch.ones(int((half == h).sum())), seed=h) for h in (0, 1)]
    return (each[0] + each[1]) / 2


def _signal_interval(signal: Tensor, half: Tensor) -> tuple[float, float]:
    return strength.interval(_draws(signal[:, None], half)[:, 0])


# --- where to spend ----------------------------------------------------------------------------------------------------------


def choices(modules: Sequence[Module]) -> dict[str, list[Module]]:
    """Give the modules of each choice that this model has, all layers last."""
    by_role = {role: [m for m in modules if re.search(pattern, m.place.name)] for role, pattern in NAMES.items()}
    found = {}
    for name, roles in CHOICES.items():
        if all(by_role[role] for role in roles):
            chosen = {m.place.name for role in roles for m in by_role[role]}
            found[name] = [m for m in modules if m.place.name in chosen]
    return {**found, "all layers": list(modules)}


def spent(found: Probe, name: str, modules: Sequence[Module], budget: int) -> Choice:
    """Give the largest common rank that fits the budget, at most what a matrix has, and what it would follow."""
    each = sum(m.parameters for m in modules)
    rank = min(budget // each, max(min(m.place.shape) for m in modules))
    if rank < 1:
        return Choice(name, modules, 0, 0, None)
    ranks = [min(rank, *m.place.shape) for m in modules]
    used = sum(m.parameters * r for m, r in zip(modules, ranks, strict=True))
    return Choice(name, modules, rank, used, share(found, modules, ranks))


def targets(modules: Sequence[Module], every: Sequence[Module]) -> list[str]:
    """Give the shortest entries of `target_modules` that name these modules among all."""
    wanted = {m.place.name for m in modules}
    names = [m.place.name for m in every]
    for length in (1, 2, 3):
        entries = {".".join(name.split(".")[-length:]) for name in wanted}
        hit = {name for name in names for entry in entries if name == entry or name.endswith("." + entry)}
        if hit == wanted:
            return sorted(entries)
    return sorted(wanted)


# --- the first step, the batch, the capacity ----------------------------------------------------------------------------------


def first_steps(modules: Sequence[Module], r: int) -> list[FirstStep]:
    """Predict Adam's first update by rate and rank, with alpha at twice the rank and where it stays as the rank doubles."""
    found = []
    for rank, alpha in ((r, ALPHA_OVER_R * r), (2 * r, ALPHA_OVER_R * r), (2 * r, 2 * ALPHA_OVER_R * r)):
        for lr in RATES:
            updates = [
                gradients.adam_first_update(m.place.shape[0], rank, alpha / rank, lr) / m.weight_norm
                for m in modules
                if m.weight_norm
            ]
            found.append(FirstStep(lr, rank, float(alpha), sorted(updates)[len(updates) // 2]))
    return found


def _noise(found: Probe) -> gain.NoiseScale:
    """Give the noise scale of the whole gradient, in rows."""
    signal = sum(_halves(m.signal, found.half) for m in found.modules)
    squares = sum(float(m.squares.mean()) for m in found.modules)
    noise = squares - signal
    return gain.NoiseScale(signal, noise, noise / signal if signal > 0 else math.nan)


def _capacity(modules: Sequence[Module], r: int, tokens: int) -> Number:
    parameters = sum(m.parameters for m in modules) * r
    inputs = {"tokens": tokens, "parameters": parameters}
    return Number(tokens / parameters, Kind.HEURISTIC, "tokens_per_parameter", 1.0, inputs=inputs)


def _bits(found: Probe, modules: Sequence[Module], r: int, tokens: int) -> Number:
    """Give the most bits a parameter that the data could write: all that the base model does not know of it yet."""
    parameters = sum(m.parameters for m in modules) * r
    most = coding.prequential([found.loss], [tokens]) / parameters
    inputs = {"loss": found.loss, "tokens": tokens, "parameters": parameters}
    return Number(most, Kind.BOUND, "excess_description_length", BITS_PER_PARAMETER.value, inputs=inputs)


def method_block(found: Advice) -> str:
    """Give the `method:` section of a configuration, with what it rests on as comments."""
    choice = next(c for c in found.choices if c.name == "all layers")
    names = targets(choice.modules, found.probe.modules)
    whole = all(m.place.rows is None for m in choice.modules)
    low, high = found.band
    n = len(found.probe.half)
    lines = [
        f"# confidence: gradient of the base model at the start, {n} rows; rank {low or '>64'} to {high or '>64'} by the 95 % band",
        "method:",
        "  name: lora",
        f"  r: {found.used}",
        f"  alpha: {ALPHA_OVER_R * found.used}",
        f"  target_modules: {'all-linear' if whole else '[' + ', '.join(names) + ']'}",
    ]
    if found.rank is None:
        lines[0] = (
            f"# confidence: none, {n} rows show no rank that follows {CAPTURED:.0%} of the gradient; r is a usual one"
        )
    return "\n".join(lines) + "\n"


def half_curve(found: Probe, module: Module) -> probe.Curve:
    """Give c(q) of one module, q = 1 ... top."""
    captured = torch.stack([module.captured[found.half == h].mean(0) for h in (0, 1)]).mean(0)
    signal = _halves(module.signal, found.half)
    return probe.Curve(captured / signal if signal > 0 else torch.full_like(captured, math.nan), signal)
