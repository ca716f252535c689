"""AdaLoRA's budget: which triplets of which layers are worth their parameters. Zhang et al. 2023,
https://arxiv.org/abs/2303.10512

After each update (t counts updates from 1) every weight p with gradient g gets a sensitivity, smoothed, and its
uncertainty:

    I = |p g|    Ī = β1 Ī + (1-β1) I    U = β2 U + (1-β2) |I - Ī|    s = Ī U

A triplet's score is s of its entry of E plus the means of s over its row of A and its column of B. Of all triplets of
all layers only the budget b(t) best keep their entry of E; the others are set to zero, and may come back until the end:

    b(t) = b0 up to tinit, then bT + (b0 - bT) (1 - (t - tinit) / (T - tfinal - tinit))³, and bT in the last tfinal

Departures from the paper, all but the ties as in the authors' code: the penalty is the mean of ‖A A^T - I‖_F and ‖B^T B
- I‖_F over all matrices, not squared. The schedule's fraction is the one above (the paper prints another numerator).
The last choice is made at T - tfinal and kept. Equal scores are shared out between the layers; a threshold would take
all of them or none. The gradients are those of the update, after clipping, and include the penalty's.

When: the method is adalora: it comes by itself. It costs two numbers for each of its parameters and a sort of all
triplets every `deltaT` steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.adapter import Method
from ...core.attach import adapters
from ...core.errors import UsageError
from ...core.stack import parts_of
from ...methods.adalora import AdaLoRA, AdaLoRAAdapter
from . import Run

METHOD_NAME = "adalora"


@dataclass(frozen=True, kw_only=True)
class AdaLoRASettings:
    """When the budget falls, and what it goes by.

    tinit: steps before it begins to fall, as a fraction of the run if below 1, otherwise as a number
    tfinal: steps after it has fallen, likewise
    deltaT: steps between two choices
    beta1: decay rate of the smoothed sensitivity
    beta2: decay rate of its uncertainty
    orth_reg_weight: factor of the penalty that keeps A and B orthonormal
    """

    tinit: float = 0.1
    tfinal: float = 0.5
    deltaT: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.1

    def __post_init__(self) -> None:
        for name, value in {
            "tinit": self.tinit,
            "tfinal": self.tfinal,
            "orth_reg_weight": self.orth_reg_weight,
        }.items():
            if not 0 <= value < float("inf"):
                raise UsageError(f"{name} must not be negative, but is {value}")
        for name, value in {"beta1": self.beta1, "beta2": self.beta2}.items():
            if not 0 < value < 1:
                raise UsageError(f"{name} must be between 0 and 1, not {value}")
        if self.deltaT < 1:
            raise UsageError(f"deltaT must be at least 1, not {self.deltaT}")

    def start(self, run: Run) -> "AdaLoRABudget":
        """Find the triplets. Raises UsageError if there are none, or no steps in which the budget could fall."""
        return AdaLoRABudget(self, run)


def refuses(method: Method) -> str | None:
    """Give the reason why this controller cannot train a method."""
    found = any(isinstance(part, AdaLoRA) for part in parts_of(method))
    return None if found else "only the method adalora has triplets to take away"


def budget(t: int, first: int, last: int, *, tinit: int, tfinal: int, total: int) -> int:
    """Give the number of triplets that may be left after update t of `total`."""
    if t <= tinit:
        return first
    if t > total - tfinal:
        return last
    left = 1 - (t - tinit) / (total - tfinal - tinit)
    return int(last + (first - last) * left**3)


class AdaLoRABudget:
    """The scores of all triplets of one adapter, and the choice among them."""

    def __init__(self, settings: AdaLoRASettings, run: Run) -> None:
        self.settings, self.total, self.schedule = settings, run.total, run.schedule
        self.layers = dict(_layers(run))
        if not self.layers:
            raise UsageError(
                "the controller adalora has nothing to prune",
                fix="take the method adalora, or leave the controller out",
            )
        self.tinit, self.tfinal = (int(v * run.total) if v < 1 else round(v) for v in (settings.tinit, settings.tfinal))
        if self.tinit + self.tfinal >= run.total:
            raise UsageError(
                "AdaLoRA's budget has no step to fall in",
                why=f"the run has {run.total} steps, of which tinit takes {self.tinit} and tfinal {self.tfinal}",
                fix="lower tinit or tfinal, or train longer",
            )
        self.first = sum(len(layer.kept) for layer in self.layers.values())
        self.last = min(self.first, sum(layer.config.target_r for layer in self.layers.values()))
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    def penalty(self) -> Tensor | None:
        """Give γ times the mean distance of A A^T and B^T B from the identity."""
        if not self.settings.orth_reg_weight:
            return None
        products = [p for a in self.layers.values() for p in (a.lora_A @ a.lora_A.T, a.lora_B.T @ a.lora_B)]
        distances = [torch.linalg.matrix_norm(p - torch.eye(len(p)).to(p)) for p in products]
        return self.settings.orth_reg_weight * torch.stack(distances).mean()

    @torch.no_grad()
    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Follow the weights, and choose when it is time."""
        t, end = step + 1, self.total - self.tfinal
        if t < end:
            self.follow()
        if t == end or (self.tinit < t < end and t % self.settings.deltaT == 0):
            self.choose(self.budget(t))
        if t == end:  # the choice stands
            self.sensitivity, self.uncertainty = {}, {}
        if t >= end:
            self.prune()

    def budget(self, t: int) -> int:
        """Give the number of triplets that may be left after update t."""
        return budget(t, self.first, self.last, tinit=self.tinit, tfinal=self.tfinal, total=self.total)

    def follow(self) -> None:
        """Smooth the sensitivity of every weight and its uncertainty."""
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        for key, weight in self._weights():
            now = (weight * weight.grad).abs() if weight.grad is not None else torch.zeros_like(weight)
            mean = self.sensitivity.setdefault(key, torch.zeros_like(weight))
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            spread = self.uncertainty.setdefault(key, torch.zeros_like(weight))
            spread.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)

    def scores(self, path: str) -> Tensor:
        """Give the scores (r,) of one layer's triplets; zero before anything was measured."""
        layer = self.layers[path]
        if not self.sensitivity:
            return torch.zeros(len(layer.kept))
        keys = {name: f"{path}/{name}" for name, _ in layer.named_parameters()}
        s = {name: self.sensitivity[key] * self.uncertainty[key] for name, key in keys.items()}
        return s["lora_E"].squeeze(1) + s["lora_A"].mean(1) + s["lora_B"].mean(0)

    def choose(self, count: int) -> None:
        """Keep the `count` best triplets and set E of the others to zero. Of equal ones a layer's first go first."""
        every = [(-score, i, path) for path in self.layers for i, score in enumerate(self.scores(path).tolist())]
        best = {(path, i) for _, i, path in sorted(every, key=lambda triplet: triplet[:2])[:count]}
        for path, layer in self.layers.items():
            layer.kept.copy_(torch.tensor([(path, i) in best for i in range(len(layer.kept))]))
        self.prune()

    @torch.no_grad()
    def prune(self) -> None:
        """Set E of what is not kept to zero."""
        for layer in self.layers.values():
            layer.lora_E.masked_fill_(~layer.kept[:, None], 0.0)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give the smoothed scores and the choice."""
        kept = {f"kept/{path}": layer.kept.to(torch.uint8) for path, layer in self.layers.items()}
        means = {f"sensitivity/{key}": value for key, value in self.sensitivity.items()}
        return {**kept, **means, **{f"uncertainty/{key}": value for key, value in self.uncertainty.items()}}, {}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Take them back."""
        device = next(iter(self.layers.values())).lora_E.device

        def named(kind: str) -> dict[str, Tensor]:
            return {
                key.removeprefix(f"{kind}/"): t.to(device) for key, t in tensors.items() if key.startswith(f"{kind}/")
            }

        self.sensitivity, self.uncertainty = named("sensitivity"), named("uncertainty")
        for path, kept in named("kept").items():
            self.layers[path].kept.copy_(kept)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for path, layer in self.layers.items():
            for name, parameter in layer.named_parameters():
                yield f"{path}/{name}", parameter


def _layers(run: Run) -> Iterator[tuple[str, AdaLoRAAdapter]]:
    for path, _, adapter in adapters(run.model, run.adapter):
        for name, part in adapter.named_modules():
            if isinstance(part, AdaLoRAAdapter):
                yield f"{path}.{name}".rstrip("."), part


CONTROLLER = AdaLoRASettings
