"""What happens beside the gradient step: budgets, restarts, links. One file per controller; the file name is its name.

Each file declares `CONTROLLER`, a frozen dataclass of settings with `start(run) -> Controller`. A configuration gives
it as `train.controller: relora` or `{name: relora, every: 100}`. Optional are `METHOD_NAME`, the method for which it is
chosen by itself, and `refuses(method) -> str | None`, the reason why it cannot work with a method.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...core.adapter import Method
from ...core.registry import METHODS, Registry
from ...core.stack import parts_of


def _one(step: int) -> int:
    return 1


@dataclass(frozen=True)
class Run:
    """What a controller may look at and act on."""

    model: nn.Module
    adapter: str
    total: int
    """Optimizer steps of the run."""
    schedule: Callable[[float], float]
    """Step -> multiplier of the learning rate, as configured; between two steps too."""
    warmup: int
    """Its warm-up steps."""
    seed: int
    batches: Callable[[int], int] = _one
    """Step -> number of its micro-batches."""


class Settings(Protocol):
    """The settings of a controller, as a configuration gives them."""

    def start(self, run: Run) -> "Controller":
        """Prepare the adapters (before the optimizer is made) and give the controller."""
        ...


class Controller(Protocol):
    """Called by the loop around each optimizer step. Steps count from 0."""

    def schedule(self, step: int) -> float:
        """Give the learning rate's multiplier."""
        ...

    def penalty(self) -> Tensor | None:
        """Give a term to add to the loss of a step, once, or None."""
        ...

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Act after the update of `step`; the gradients it used are still there."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give what a checkpoint must hold besides the adapter, as tensors and as JSON."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Take that state back. Called before the adapter's tensors are copied, whose shapes may depend on it."""
        ...


class Nothing:
    """The controller of an ordinary run: the configured schedule."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def schedule(self, step: int) -> float:
        """Give what is configured."""
        return self.run.schedule(step)

    def penalty(self) -> None:
        """Add nothing."""

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Hold nothing."""
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Need nothing."""


CONTROLLERS = Registry("lorakit.train.controllers", "CONTROLLER", "controller")


def brought(method: Method) -> list[str]:
    """Give the controllers that a method, or a part of a stack, brings along: those that bear its name and can work with it."""
    names = {METHODS.name_of(type(part)) for part in parts_of(method)}
    own = {name: vars(CONTROLLERS.module(name)) for name in sorted(CONTROLLERS)}
    return [name for name, file in own.items() if file.get("METHOD_NAME") in names and not file["refuses"](method)]
