"""A uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5, the default of `nn.Linear`), B zero: loralib's and PEFT's start.

Hu et al. 2021, https://arxiv.org/abs/2106.09685; He et al. 2015, https://arxiv.org/abs/1502.01852

When: always, unless there is a reason for another one. It costs nothing.
"""

import math

from torch import Tensor, nn

from ..core.start import Start


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A with variance 1/(3 in), B with zero."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    B.zero_()
