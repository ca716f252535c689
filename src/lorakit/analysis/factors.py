"""The factors of a change, where a method has any: ΔW = s·B·A, or, of DoRA, the part of it that is."""

from functools import singledispatch
from typing import NamedTuple

from torch import Tensor

from ..core.adapter import AbstractAdapter, AdditiveAdapter, Base
from ..methods.adalora import AdaLoRAAdapter
from ..methods.dora import DoRAAdapter
from ..methods.vera import VeRAAdapter


class Factors(NamedTuple):
    """A (r, in), B (out, r) and s."""

    A: Tensor
    B: Tensor
    scale: float


@singledispatch
def factors(adapter: AbstractAdapter, base: Base) -> Factors | None:
    """Give the factors of an adapter; None where the change is not a product of two small matrices.

    An additive method says so itself (`low_rank`). One that does not is measured through its dense change: right, and slower.
    """
    return None


@factors.register
def _(adapter: AdditiveAdapter, base: Base) -> Factors | None:
    found = adapter.eval().low_rank(base)
    if found is None or found.gain is not None:
        return None
    return Factors(found.A.detach(), found.B.detach(), float(found.scale))


@factors.register
def _(adapter: AdaLoRAAdapter, base: Base) -> Factors:  # also where the budget has left a layer no triplet
    scale = float(adapter.scale) / (float(adapter.ranknum) + 1e-5)
    return Factors((adapter.lora_A * adapter.lora_E).detach(), adapter.lora_B.detach(), scale)


@factors.register
def _(adapter: DoRAAdapter, base: Base) -> Factors:
    return Factors(adapter.lora_A.detach(), adapter.lora_B.detach(), float(adapter.scale))


@factors.register
def _(adapter: VeRAAdapter, base: Base) -> Factors:
    A, B = adapter.projections()
    d, b = adapter.vera_lambda_d[:, None], adapter.vera_lambda_b[:, None]
    return Factors((d * A).detach(), (b * B).detach(), scale=1.0)
