"""Init[B]: A zero, B random with variance 1/r. Hayou, Ghosh and Yu 2024, https://arxiv.org/abs/2406.08447

The mirror image of the usual start. It is stable but needs a several times smaller learning rate, and under-trains B; the
paper recommends the usual one. Here so that the comparison can be made.

When: the two zero factors are to be compared. It costs nothing, and wants a learning rate of its own.
"""

from torch import Tensor

from ..core.start import Start

ZERO = "A"
"""The factor that starts at zero; of the other starts it is B, or neither."""


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A with zero, B with variance 1/r."""
    A.zero_()
    B.normal_(std=B.shape[1] ** -0.5)
