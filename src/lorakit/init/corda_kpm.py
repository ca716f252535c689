"""CorDA that preserves knowledge: the components of W that the data needs least. Yang et al. 2024, https://arxiv.org/abs/2406.05223

The paper's "knowledge-preserved" mode: measured on questions about what is to be kept, the r smallest components are free to
be trained and the rest stays. `corda` says what the components are. Calibrate it on such questions
(`core/calibrate.py`); a training run measures the data it trains on.

When: certain knowledge is to be kept and data that ask for it are at hand. It costs what CorDA costs.
"""

from torch import Tensor

from ..core.start import Start
from ._spectral import fill
from .corda import components

FROM_BASE = True
NEEDS = frozenset({"inputs"})


def start(A: Tensor, B: Tensor, site: Start) -> None:
    """Fill A and B with the r smallest context-oriented components of W."""
    r = len(A)
    U, S, right = components(A, B, site)
    fill(A, B, U[:, -r:], S[-r:], right[-r:], site.scale)
