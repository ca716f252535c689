"""A uniform with variance 2/(in + r), B zero. Glorot and Bengio 2010, https://proceedings.mlr.press/v9/glorot10a.html

When: a rule that looks at both sides of A is wanted; for r much smaller than the inputs it is close to the usual
start. It costs nothing.
"""

from torch import Tensor, nn

from ..core.start import Start


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A with variance 2/(in + r), B with zero."""
    nn.init.xavier_uniform_(A)
    B.zero_()
