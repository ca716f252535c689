"""Plain gradient descent with momentum `betas[0]`; with momentum 0 one step is exactly -lr times the gradient.

It trains adapters worse than AdamW does. It is here because it keeps one number per parameter instead of two, and
because the closed forms of the methods (what one step does to B A) are statements about it.

When: a closed form is to be checked, or one number a parameter is all the memory there is. It costs many more steps,
and a rate found for each task.
"""

import torch

from .groups import Groups, OptimSettings


def build(groups: list[dict], settings: OptimSettings) -> torch.optim.Optimizer:
    """Make the optimizer. Rates and weight decays are those of `groups`; `settings.betas[0]` is the momentum."""
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.betas[0])


def planned_bytes(groups: Groups, settings: OptimSettings) -> int:
    """Give the bytes of the state that this optimizer will keep: the momentum, if there is one."""
    return sum(p.nbytes for group in groups for _, p in group["params"]) if settings.betas[0] else 0
