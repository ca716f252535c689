"""AdamW whose states lie in CUDA's unified memory, so that they make room in a spike. QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314

bitsandbytes' `PagedAdamW32bit`: the updates of AdamW. The states of an adapter are small; it matters where most of the
memory is activations of long rows, or modules are trained in full. On a processor there is nothing to page to.

When: the optimizer's state does not fit beside the activations on an NVIDIA GPU, mostly with modules trained in full.
It costs the transfer of what is paged out, and nothing while it fits.
"""

import importlib.util
from typing import Any

import torch

from ..core.errors import UsageError
from .groups import Groups, OptimSettings


def build(groups: list[dict], settings: OptimSettings) -> torch.optim.Optimizer:
    """Make the optimizer. Raises UsageError without an NVIDIA GPU and without bitsandbytes."""
    devices = {parameter.device.type for group in groups for _, parameter in group["params"]}
    if devices != {"cuda"}:
        raise UsageError(
            f"optim.name: paged_adamw needs an NVIDIA GPU; the parameters are on {', '.join(sorted(devices))}",
            why="its states are paged between the memory of the GPU and that of the machine",
            fix="optim.name: adamw, which makes the same updates",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("optim.name: paged_adamw needs bitsandbytes", fix="pip install 'lorakit[quant]'")
    from bitsandbytes.optim import PagedAdamW32bit

    return make(PagedAdamW32bit, groups, settings)


def planned_bytes(groups: Groups, settings: OptimSettings) -> int:
    """Give the bytes of the state that this optimizer will keep: two means of each parameter in fp32, which can be paged."""
    return sum(8 * p.numel() for group in groups for _, p in group["params"])


def make(cls: type[torch.optim.Optimizer], groups: list[dict], settings: OptimSettings) -> torch.optim.Optimizer:
    """Make an AdamW of bitsandbytes; rates and weight decays are those of `groups`."""
    arguments: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "weight_decay": 0.0}
    return cls(groups, **arguments)
