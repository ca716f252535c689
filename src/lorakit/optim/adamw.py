"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): torch's own, in its fused form where the device has one.

When: first. It costs two numbers a trained parameter, and with `optim.b_ratio` above 1 it is LoRA+.
"""

import torch

from ._base import torch_adamw_bytes
from .groups import Groups, OptimSettings


def build(groups: list[dict], settings: OptimSettings) -> torch.optim.Optimizer:
    """Make the optimizer. Rates and weight decays are those of `groups`; `settings` gives the betas and eps."""
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)


def planned_bytes(groups: Groups, settings: OptimSettings) -> int:
    """Give the bytes of the state that this optimizer will keep."""
    return torch_adamw_bytes(groups)
