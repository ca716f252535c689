"""An adapter's whole state by name, for checkpoints: everything it holds, also what is frozen or not saved for others."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.attach import adapters
from ..core.errors import FileError


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Give `<layer path>/<own name>` -> tensor, the live ones."""
    return {f"{path}/{key}": value for path, _, a in adapters(model, name) for key, value in a.state_dict().items()}


@torch.no_grad()
def restore_adapter(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors back in place. Raises FileError unless names and shapes agree exactly."""
    live = adapter_tensors(model, name)
    differing = sorted(live.keys() ^ tensors.keys()) + [
        k for k in live if k in tensors and live[k].shape != tensors[k].shape
    ]
    if differing:
        raise FileError(
            f"the checkpoint's adapter has other tensors: {', '.join(differing[:5])}",
            fix="resume with the configuration of the run",
        )
    for key, value in live.items():
        value.copy_(tensors[key])
