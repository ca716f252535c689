"""What the optimizers share that look at A when they move its B: the pairs they need, and acting before a step."""

from collections.abc import Callable
from typing import Any

import torch

from ..core.errors import UsageError
from .groups import Factors, Groups


def pairs(groups: Groups, optimizer: str, *, product: bool) -> list[Factors]:
    """Give the pairs of factors. They were paired by their declared roles, never by their order.

    product: only those whose change is s·B·A and nothing else will do. Raises UsageError with the reason if there is
    none, if a factor has no partner, if one has several, and if one does not fit.
    """
    factors = groups.factors
    paired = {id(p) for f in factors for p in (f.A, f.B)}
    members = [(name, p) for group in groups if group["role"] in ("A", "B") for name, p in group["params"]]
    single = [name for name, p in members if id(p) not in paired]
    if single or not factors:
        why = f"{single[0]} has no partner" if single else "the adapter has no such factors"
        raise _refused(optimizer, "it needs the two factors of W' = W + s B A", why)
    if len({id(f.A) for f in factors}) < len(factors):
        raise _refused(optimizer, "each factor A must belong to one B", "the layers of this method share theirs")
    if product:
        other = [f.path for f in factors if f.scale is None]
        if other:
            raise _refused(
                optimizer, "the change of a layer must be s B A, nothing else", f"{other[0]} computes another"
            )
    return factors


def _refused(optimizer: str, need: str, why: str) -> UsageError:
    return UsageError(f"optim.name: {optimizer} cannot train this adapter: {need}", why=why, fix="optim.name: adamw")


def before_each_step(optimizer: torch.optim.Optimizer, act: Callable[[], None]) -> torch.optim.Optimizer:
    """Let `act` change the gradients before each step. A closure would compute them anew, so it is refused."""

    def hook(_: torch.optim.Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if any(a is not None for a in (*arguments[1:], *keywords.values())):
            raise UsageError("this optimizer takes no closure", why="it changes the gradients before the step")
        with torch.no_grad():
            act()

    optimizer.register_step_pre_hook(hook)
    return optimizer
