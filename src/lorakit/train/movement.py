"""How far an adapter has moved: its change over the weights it changes, what a step adds to it, and A from its start."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Base
from ..core.attach import Adapted
from ..core.scaling import spots
from ..optim.groups import Factors


class Change(NamedTuple):
    """A copy of the factors of ΔW = scale·B·A of one matrix."""

    A: Tensor
    B: Tensor
    scale: float


class Movement:
    """The measurements of adapter `name`; `pairs` are the factors whose A is compared with its start."""

    def __init__(self, model: nn.Module, name: str, pairs: Sequence[Factors]) -> None:
        self.model, self.name, self.pairs = model, name, pairs
        self._start: dict[str, Tensor] = {}
        self._weights: float | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Keep A as it starts."""
        self._start = {pair.path: pair.A.detach().clone() for pair in self.pairs}

    def starts(self) -> dict[str, Tensor]:
        """Give what was kept."""
        return self._start

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take it back, if it fits."""
        fits = [p for p in self.pairs if p.path in tensors and tensors[p.path].shape == p.A.shape]
        self._start = {p.path: tensors[p.path].to(p.A) for p in fits} if len(fits) == len(self.pairs) else {}

    @torch.no_grad()
    def changes(self) -> list[Change | None]:
        """Copy the factors of every change; None for one that is not a product of two."""
        found: list[Change | None] = []
        for spot in spots(self.model, self.name):
            adapter, low = spot.adapter, None
            if isinstance(adapter, AdditiveAdapter):
                training = adapter.training
                adapter.eval()  # what a chain with dropout is in training has no factors
                low = adapter.low_rank(cast(Base, spot.layer))
                adapter.train(training)
            usable = low is not None and low.gain is None
            found.append(Change(low.A.detach().clone(), low.B.detach().clone(), float(low.scale)) if usable else None)
        return found

    @torch.no_grad()
    def of_step(self, before: Sequence[Change | None]) -> dict[str, float]:
        """Give rho, rho_step and A_movement after a step, NaN where not measured. `before`: the changes before it."""
        after = self.changes()
        pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
        found = {"rho": math.nan, "rho_step": math.nan, "A_movement": self._moved()}
        if len(pairs) < len(after) or not pairs:
            return found
        weights = self._size_of_weights()
        if not weights:
            return found
        found["rho"] = math.sqrt(math.fsum(_square(a.A, a.B * a.scale) for _, a in pairs)) / weights
        steps = [_square(torch.cat([a.A, b.A]), torch.cat([a.B * a.scale, -b.B * b.scale], dim=1)) for b, a in pairs]
        found["rho_step"] = math.sqrt(max(math.fsum(steps), 0.0)) / weights
        return found

    def _moved(self) -> float:
        if not self._start:
            return math.nan
        start = [self._start[pair.path] for pair in self.pairs]
        gone = torch._foreach_sub([pair.A.detach() for pair in self.pairs], start)
        whole = math.fsum(float(t.double().square().sum()) for t in start)
        return math.sqrt(math.fsum(float(t.double().square().sum()) for t in gone) / whole) if whole else math.nan

    def _size_of_weights(self) -> float:
        """Give the norm of all adapted matrices together; read once, for the base is frozen."""
        if self._weights is None:
            layers: dict[int, Adapted] = {id(spot.layer): spot.layer for spot in spots(self.model, self.name)}
            self._weights = math.sqrt(math.fsum(_norm(cast(Base, layer).matrix()) ** 2 for layer in layers.values()))
        return self._weights


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32)))


def _square(A: Tensor, B: Tensor) -> float:
    """Give ||B A||_F^2 from the two r x r Gram matrices, in float64: the difference of two close changes cancels."""
    A, B = (t.to(torch.float32 if t.device.type == "mps" else torch.float64) for t in (A, B))
    return float(((B.T @ B) * (A @ A.T)).sum())
