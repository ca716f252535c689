"""A normal with standard deviation 1/r, B zero: the paper's start. Hu et al. 2021, section 4.1, https://arxiv.org/abs/2106.09685

When: the paper is to be reproduced to the letter. Its size depends on r and not on the layer's inputs, so the
learning rate has to follow the rank. It costs nothing.
"""

from torch import Tensor

from ..core.start import Start


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A with standard deviation 1/r, B with zero."""
    A.normal_(std=1 / A.shape[0])
    B.zero_()
