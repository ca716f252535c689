"""Whether every adapted layer has learned anything, asked before an adapter is called done."""

from torch import nn

from ..core.attach import adapters
from ..core.chain import Chain


def untrained_layers(model: nn.Module, name: str) -> list[str]:
    """Give the layers where a trained factor of adapter `name` is still zero, as it started; the layer is then unchanged.

    In a chain with frozen links the live factors may have started a moment ago: the links are what was learned.
    """
    found = []
    for path, _, adapter in adapters(model, name):
        linked = [f"{prefix}." for prefix, m in adapter.named_modules() if isinstance(m, Chain) and m.frozen_A.numel()]
        for own, role in adapter.roles().items():
            in_chain = any(f".{own}".startswith(prefix if prefix == "." else f".{prefix}") for prefix in linked)
            if role in ("A", "B") and not in_chain and not adapter.get_parameter(own).count_nonzero():
                found.append(path)
    return found
