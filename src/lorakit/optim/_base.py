"""What the optimizers written here share: the step around their update, and AdamW for what they leave to it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .groups import Groups, OptimSettings


@runtime_checkable
class Accumulating(Protocol):
    """An optimizer that sums the gradients of a step's micro-batches in a form of its own, if there are several.

    What is summed belongs to a step under way: no checkpoint holds it, and `zero_grad` forgets it.
    """

    def take(self) -> None:
        """Add the gradients of a micro-batch to the sum and free them: after each backward pass."""
        ...

    def give(self) -> None:
        """Put the sum into the gradients: after the last micro-batch, before they are looked at."""
        ...


class Optimizer(torch.optim.Optimizer, ABC):
    """A torch optimizer that says in `update` how the parameters move. All it keeps is in `state`, by parameter."""

    def __init__(self, groups: Groups, settings: OptimSettings) -> None:
        super().__init__(list(groups), {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step; `closure` computes loss and gradients first, and its value is given back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    @abstractmethod
    def update(self) -> None:
        """Move every parameter that has a gradient."""


def adam_direction(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
    """Take `gradient` into the means in `state` and give m/(sqrt(v) + eps), both without their bias towards zero.

    Kingma and Ba 2015, https://arxiv.org/abs/1412.6980. In `state`: exp_avg, exp_avg_sq (as `gradient`) and the number
    step. `gradient` may be anything made of a parameter's gradient, such as its projection.
    """
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] = 0
    state["step"] += 1
    beta1, beta2 = group["betas"]
    mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
    square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = square.sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
    return mean / (1 - beta1 ** state["step"]) / root


def adam_bytes(parameter: Tensor) -> int:
    """Give the bytes that `adam_direction` keeps for the gradient of a parameter."""
    return 2 * parameter.nbytes


def torch_adamw_bytes(groups: Groups) -> int:
    """Give the bytes that torch's AdamW keeps: two means of each parameter and a count in fp32."""
    return sum(adam_bytes(p) + 4 for group in groups for _, p in group["params"])


def adamw(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Move `parameter`, if it has a gradient, as torch's AdamW does."""
    if parameter.grad is not None:
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(group["lr"] * adam_direction(state, parameter.grad, group))
