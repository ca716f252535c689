"""A normal with variance 1/in, B zero. He et al. 2015 with linear gain, https://arxiv.org/abs/1502.01852"""

from torch import Tensor, nn

from ..core.start import Start


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A with variance 1/in (so that A x has the size of x), B with zero."""
    nn.init.kaiming_normal_(A, nonlinearity="linear")
    B.zero_()
