"""The exponent of a heavy tail, with the standard error that a few singular values leave it."""

import math
from typing import NamedTuple

from torch import Tensor

from ._precision import wide


class Tail(NamedTuple):
    """Exponent α of p(x) ~ x^-α above the least value, its standard error, and the number of values."""

    alpha: float
    se: float
    n: int


def exponent(values: Tensor, least: float | None = None) -> Tail:
    """Give α = 1 + n / sum ln(x_i / x_min) and (α - 1)/sqrt n. Clauset, Shalizi and Newman 0706.1062, equation 3.1.

    values: positive; x_min is `least`, or the smallest of them (which then counts as one of the n). NaN for one value.
    """
    x = wide(values)
    x = x[x >= (float(x.min()) if least is None else least)]
    logs = float((x / (float(x.min()) if least is None else least)).log().sum())
    alpha = 1 + len(x) / logs if logs > 0 else math.nan
    return Tail(alpha, (alpha - 1) / math.sqrt(len(x)), len(x))
