"""Plain gradient descent with momentum `betas[0]`; with momentum 0 one step is exactly -lr times the gradient.

It trains adapters worse than AdamW does. It is here because it keeps one number per parameter instead of two, and
because the closed forms of the methods (what one step does to B A) are statements about it.
"""

import torch

from .groups import OptimSettings


def build(groups: list[dict], settings: OptimSettings) -> torch.optim.Optimizer:
    """Make the optimizer. Rates and weight decays are those of `groups`; `settings.betas[0]` is the momentum."""
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.betas[0])
