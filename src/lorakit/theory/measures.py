"""What can be said of one changed matrix, as `Number`s: from its factors alone, and with the base matrix."""

import math

import torch
from torch import Tensor

from . import flops, gauge, nulls, rounding, subspace
from . import spectrum as sp
from .number import Kind, Number
from .spectrum import Factored


def of_spectrum(S: Tensor, d: int, k: int, r: int) -> dict[str, Number]:
    """Give norms and ranks of a change (d, k) of rank at most r with singular values S, each with its null, if it has one."""
    null = nulls.random_factors(d, k, r) if r and bool(S.any()) else None
    inputs = {"d": d, "k": k, "r": r}

    def exact(value: float, formula: str, of_null: float | None = None, **more: float) -> Number:
        return Number(float(value), Kind.EXACT, formula, of_null, inputs={**inputs, **more})

    return {
        "frobenius": exact(sp.frobenius(S), "frobenius"),
        "spectral": exact(sp.spectral(S), "spectral"),
        "nuclear": exact(sp.nuclear(S), "nuclear"),
        "stable_rank": exact(sp.stable_rank(S), "stable_rank", null and null.stable_rank),
        "effective_rank": exact(sp.effective_rank(S), "effective_rank", null and null.effective_rank),
        "participation": exact(sp.participation(S), "participation", null and null.participation),
        "energy_rank_90": exact(sp.energy_rank(S, 0.9), "energy_rank", null and null.energy_rank_90, share=0.9),
        "energy_rank_99": exact(sp.energy_rank(S, 0.99), "energy_rank", null and null.energy_rank_99, share=0.99),
        "numerical_rank": exact(sp.numerical_rank(S, d, k), "numerical_rank"),
        "condition": exact(sp.condition(S, d, k), "condition", null and null.condition),
    }


def of_factors(A: Tensor, B: Tensor, scale: float, S: Tensor | None = None) -> dict[str, Number]:
    """Give everything that A (r, k), B (d, r) and s say: `of_spectrum`, counts, and facts of the parametrisation."""
    (r, k), d = A.shape, B.shape[0]
    S = sp.singular_values(A, B, scale) if S is None else S
    return {**of_spectrum(S, d, k, r), **of_parametrisation(A, B)}


def of_parametrisation(A: Tensor, B: Tensor) -> dict[str, Number]:
    """Give what A (r, k) and B (d, r) are by themselves, whatever the change is made of them."""
    (r, k), d = A.shape, B.shape[0]

    def of_these(value: float, formula: str) -> Number:
        return Number(value, Kind.PARAMETRISATION, formula)

    return {
        "parameters": Number(flops.parameters(d, k, r), Kind.EXACT, "parameters"),
        "degrees_of_freedom": Number(flops.degrees_of_freedom(d, k, r), Kind.EXACT, "degrees_of_freedom"),
        "break_even_rank": Number(flops.break_even_rank(d, k), Kind.EXACT, "break_even_rank"),
        "imbalance": of_these(gauge.imbalance(A, B), "imbalance"),
        "norm_A": of_these(_norm(A), "norm"),
        "norm_B": of_these(_norm(B), "norm"),
    }


def storage(A: Tensor, B: Tensor, S: Tensor, dtype: torch.dtype, *, stored: bool) -> dict[str, Number]:
    """Give the relative error of A and B in `dtype`, and how many singular values stand above it.

    stored: they are in that dtype already, so the error is what it typically was; else it is measured by rounding them.
    """
    if stored:
        error = Number(rounding.storage_floor(dtype), Kind.ESTIMATE, "storage_floor")
    else:
        error = Number(rounding.storage_error(A, B, dtype), Kind.PARAMETRISATION, "storage_error")
    above = float((error.value * sp.frobenius(S) < S).sum()) if math.isfinite(error.value) else 0.0
    name = str(dtype).removeprefix("torch.")
    return {f"storage_error_{name}": error, f"rank_above_{name}": Number(above, error.kind, error.formula)}


def with_base(delta: Factored, weight: Tensor) -> dict[str, Number]:
    """Give what a change (d, k) is beside W (d, k): ρ, amplification (of the directions with 90 % of the energy) and dominance."""
    d, k = weight.shape
    size, whole = sp.frobenius(delta.S), _norm(weight)
    rho = size / whole if whole else math.nan
    if not size:
        return {"relative_norm": Number(rho, Kind.EXACT, "relative_norm", inputs={"norm_W": whole})}
    q = sp.energy_rank(delta.S, 0.9)
    amplified = subspace.amplification(delta, weight, q)
    largest = float(subspace.dominance(delta, weight).max())
    null = subspace.dominance_null(delta, weight)
    return {
        "relative_norm": Number(rho, Kind.EXACT, "relative_norm", inputs={"norm_W": whole}),
        "amplification": Number(
            amplified.factor, Kind.EXACT, "amplification", amplified.null, inputs={"d": d, "k": k, "directions": q}
        ),
        "dominance": Number(largest, Kind.EXACT, "dominance", null),
    }


def intruding(delta: Factored, weight: Tensor) -> dict[str, Number]:
    """Give the intruders among the first directions of W + ΔW, those that ΔW brought and those that mixing made."""
    found = subspace.intruders(weight, delta)
    chance = subspace.best_match_null(min(weight.shape))
    inputs = {"top": len(found.cosines), "threshold": subspace.INTRUDER_COSINE, "cosine_by_chance": chance}
    return {
        "intruders_attributable": Number(found.attributable, Kind.EXACT, "intruders", 0.0, inputs=inputs),
        "intruders_smeared": Number(found.smeared, Kind.EXACT, "intruders", inputs=inputs),
    }


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))
