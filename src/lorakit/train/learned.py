"""Whether every adapted layer has learned anything, asked before an adapter is called done."""

from pathlib import Path

from torch import nn

from ..core.attach import adapters
from ..core.chain import Chain
from ..core.errors import CheckError


def untrained_layers(model: nn.Module, name: str) -> list[str]:
    """Give the layers where a trained factor of adapter `name` is still zero as it started, so that nothing changes.

    In a chain with frozen links the live factors may have started a moment ago: the links are what was learned.
    """
    found = []
    for path, _, adapter in adapters(model, name):
        chains = [m for m in adapter.modules() if isinstance(m, Chain) and m.frozen_A.numel()]
        linked = {id(p) for chain in chains for p in chain.parameters()}
        for own, role in adapter.roles().items():
            p = adapter.get_parameter(own)
            if role in ("A", "B") and id(p) not in linked and not p.count_nonzero():
                found.append(path)
    return found


def require_learned(model: nn.Module, name: str, saved: Path) -> None:
    """Raise CheckError if a layer's adapter changes nothing; it has been saved all the same."""
    idle = untrained_layers(model, name)
    if idle:
        raise CheckError(
            f"{len(idle)} adapted layers did not learn: {', '.join(idle[:5])}",
            why="a factor that starts at zero is still zero there, so the adapter changes nothing",
            fix="train longer, raise optim.lr, or leave these layers out with exclude_modules",
            where=str(saved),
        )
