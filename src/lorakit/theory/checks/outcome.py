"""What a check gives back, and where it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Outcome(NamedTuple):
    """Expected and measured values, in order. They agree if they differ by at most

        tolerance + rounding * eps * max(1, |expected|)        eps: of the dtype the check ran in

    tolerance: what the statement itself leaves open, such as the spread of a random draw; 0 for identities.
    """

    expected: tuple[float, ...]
    measured: tuple[float, ...]
    tolerance: float = 0.0
    rounding: float = 1000.0

    def allowed(self, eps: float) -> list[float]:
        """Give the largest difference that is allowed of each value."""
        return [self.tolerance + self.rounding * eps * max(1.0, abs(e)) for e in self.expected]


@dataclass(frozen=True)
class Where:
    """Device and dtype of a check's tensors, and its random numbers: drawn on the CPU, so that they are the same everywhere."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int, seed: int) -> Tensor:
        """Draw a normal tensor."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    def rand(self, *shape: int, seed: int) -> Tensor:
        """Draw uniform numbers in [0, 1)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    def basis(self, n: int, q: int, seed: int) -> Tensor:
        """Draw q orthonormal directions of n."""
        generator = torch.Generator().manual_seed(seed)
        Q, _ = torch.linalg.qr(torch.randn(n, q, generator=generator, dtype=torch.float64))
        return Q.to(self.device, self.dtype)

    def tensor(self, values: object) -> Tensor:
        """Make a tensor of numbers."""
        return torch.tensor(values, device=self.device, dtype=self.dtype)


Run = Callable[[Where], Outcome]


def largest(difference: Tensor) -> float:
    """Give the largest magnitude."""
    return float(difference.abs().max())
