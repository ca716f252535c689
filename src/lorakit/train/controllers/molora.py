"""MoLoRA's balance: while it trains, a penalty on routers that send every token to the same experts. Li et al. 2024,
https://arxiv.org/abs/2404.15159; the penalty is that of Switch Transformers, Fedus et al. 2021,
https://arxiv.org/abs/2101.03961

The adapters compute the penalty themselves (`methods/molora.py`). This sets its factor before each step: `balance`
over the number of layers and of the step's micro-batches, so that it is the mean over both.

When: by itself, with the method molora and a `top_k`. It costs a mean over the tokens a layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ...core.adapter import Method
from ...core.attach import adapters
from ...core.errors import UsageError
from ...core.stack import parts_of
from ...methods.molora import MoLoRA, MoLoRAAdapter
from . import Run

METHOD_NAME = "molora"


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How strongly routers are pushed to use all experts.

    balance: factor of the penalty; 0 for none
    """

    balance: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.balance < float("inf"):
            raise UsageError(f"balance must not be negative, but is {self.balance}")

    def start(self, run: Run) -> "Balanced":
        """Find the routers. Raises UsageError if none chooses."""
        return Balanced(self, run)


def refuses(method: Method) -> str | None:
    """Give the reason why there is nothing to balance."""
    if any(isinstance(part, MoLoRA) and part.top_k is not None for part in parts_of(method)):
        return None
    return "only the method molora with a top_k chooses among experts"


@final
class Balanced:
    """The routers of one run."""

    def __init__(self, settings: Balance, run: Run) -> None:
        self.settings, self.run, self.schedule = settings, run, run.schedule
        self.routers = list(_routers(run))
        if not self.routers:
            raise UsageError(
                "the controller molora has nothing to balance",
                fix="take the method molora with a top_k, or leave the controller out",
            )
        self.step = 0
        self._weigh()

    def penalty(self) -> None:
        """Add nothing: the gradient of the penalty comes with that of the loss."""

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Weigh the next step."""
        self.step = step + 1
        self._weigh()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give the step that comes next."""
        return {}, {"step": self.step}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Go on there."""
        self.step = scalars["step"]
        self._weigh()

    def _weigh(self) -> None:
        if self.step < self.run.total:
            factor = self.settings.balance / (len(self.routers) * self.run.batches(self.step))
            for router in self.routers:
                router.balance.fill_(factor)


def _routers(run: Run) -> Iterator[MoLoRAAdapter]:
    for _, _, adapter in adapters(run.model, run.adapter):
        for part in adapter.modules():
            if isinstance(part, MoLoRAAdapter) and part.config.top_k is not None:
                yield part


CONTROLLER = Balance
