"""How much of ΔW is left after W + ΔW has been rounded to the grid that W is stored on.

W is on the grid, so W + δ rounds to W + ulp·round(δ/ulp). For δ normal of deviation t ulp (j from 0):

    retained   c(t)   = <rounded, ΔW> / ||ΔW||^2        = (2/t) sum_j φ((j + 1/2)/t)
    second     m(t)   = E[round^2]                      = 2 sum_j (2j + 1) Q((j + 1/2)/t)
    error^2    e(t)^2 = ||rounded - ΔW||^2 / ||ΔW||^2   = 1 - 2 c(t) + m(t)/t^2
    unchanged  u(t)   = P(round = 0)                    = erf(1 / (2 sqrt2 t))

averaged over the histogram of ulp(W). For t above 2 these are 1, t^2 + 1/12, 1/(12 t^2) to 1e-15.
Holds where the entries of ΔW are about normal of one deviation and W + ΔW mostly stays in the binade of W; not for NF4 or
int8 grids, which are not powers of two (measure those). `measure` is what really happens and needs no assumption.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import spectrum
from ._precision import inner, wide

SMOOTH = 2.0  # t from which the sums equal their limits to double precision


def ulp(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Give the distance of neighbouring numbers of `dtype` at each |w|: 2^(e-7) for bfloat16, 2^(e-10) for float16."""
    info = torch.finfo(dtype)
    size = wide(weight).abs().clamp_min(info.tiny)  # below it, and at 0, numbers are subnormal, all equally far apart
    _, exponent = torch.frexp(size)
    return torch.ldexp(torch.full_like(size, info.eps), exponent - 1)


def ulp_histogram(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Give the distinct spacings of `dtype` at the entries of `weight`, ascending, and the share of entries of each."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(wide(weight).abs().clamp_min(info.tiny).flatten())
    low = int(exponent.min()) if len(exponent) else 0
    counts = torch.bincount(exponent - low).cpu()  # far quicker than sorting the values
    found = counts.nonzero().flatten()
    values = torch.ldexp(torch.full((len(found),), info.eps, dtype=torch.float64), found + low - 1)
    return values, counts[found].double() / counts.sum()


def retained(t: Tensor | float) -> Tensor:
    """Give c(t) for t = deviation / ulp; 0 at t = 0."""
    return _summed(t)[0]


def relative_error(t: Tensor | float) -> Tensor:
    """Give e(t); 1 at t = 0, where nothing is left, and 1/(sqrt12 t) for large t."""
    t = _as_tensor(t)
    c, m = _summed(t)
    small = torch.where(t > 0, 1 - 2 * c + m / t.clamp_min(1e-300).square(), torch.ones_like(t))
    return torch.where(t > SMOOTH, 1 / (math.sqrt(12) * t.clamp_min(SMOOTH)), small.clamp_min(0).sqrt())


def unchanged(t: Tensor | float) -> Tensor:
    """Give u(t), the share of entries that rounding leaves where they were."""
    return torch.erf(1 / (2 * math.sqrt(2) * _as_tensor(t).clamp_min(1e-300)))


class Rounding(NamedTuple):
    """What rounding does to a change."""

    retained: float
    """<W' - W, ΔW> / ||ΔW||_F^2: the strength at which ΔW is left."""
    error: float
    """||(W' - W) - ΔW||_F / ||ΔW||_F: noise over signal."""
    unchanged: float
    """Share of the entries of W that stay as they were."""


def predict(delta_rms: float, ulps: Tensor, shares: Tensor) -> Rounding:
    """Give the closed form for entries of ΔW with root mean square `delta_rms`, over a histogram of ulp(W)."""
    t = delta_rms / ulps.double()
    mean = [float((shares * value).sum()) for value in (retained(t), relative_error(t).square(), unchanged(t))]
    return Rounding(mean[0], math.sqrt(mean[1]), mean[2])


def predict_off_grid(delta_rms: float, ulps: Tensor, shares: Tensor) -> Rounding:
    """Give the closed form where W is stored finer than the grid, so that both round(W + ΔW) and round(W) are rounded.

    With the place of W between two grid points uniform, round(W + δ) - round(W) is δ on average, and f ulp away from a whole
    number of ulp it errs by f (1 - f) ulp^2. Over δ normal of deviation t ulp

        retained 1     e(t)^2 = (1/6 - sum_n cos-moments / (pi n)^2) / t^2     cos-moments exp(-2 pi^2 n^2 t^2)
        unchanged  E max(0, 1 - |δ|) = erf(1/(sqrt2 t)) - t sqrt(2/pi) (1 - exp(-1/(2 t^2)))
    """
    t = (delta_rms / ulps.double()).clamp_min(1e-150)
    n = torch.arange(1, 12, dtype=torch.float64, device=t.device)
    series = 1 / 6 - ((-2 * (math.pi * n * t[:, None]).square()).exp() / (math.pi * n).square()).sum(1)
    mean_size = t * math.sqrt(2 / math.pi)
    variance = torch.where(t < 0.2, mean_size - t.square(), series)  # below 0.2 no |δ| exceeds an ulp
    still = torch.erf(1 / (math.sqrt(2) * t)) - mean_size * (1 - (-1 / (2 * t.square())).exp())
    return Rounding(1.0, math.sqrt(float((shares * variance / t.square()).sum())), float((shares * still).sum()))


def measure(weight: Tensor, delta: Tensor, dtype: torch.dtype) -> Rounding:
    """Round W + ΔW to `dtype` once, from a sum in float32 at least, and compare. The reference is W as `dtype` holds it."""
    base = weight.to(dtype)
    merged = (wide(base) + wide(delta)).to(dtype)
    left = wide(merged) - wide(base)
    return compare(left, delta)


def compare(left: Tensor, delta: Tensor) -> Rounding:
    """Compare the change that is left with the one that was wanted. NaN for a change of zero."""
    size = float(wide(delta).square().sum())
    if size == 0:
        return Rounding(math.nan, math.nan, 1.0)
    error = float((wide(left) - wide(delta)).square().sum())
    return Rounding(inner(left, delta) / size, math.sqrt(error / size), float((left == 0).double().mean()))


def storage_error(A: Tensor, B: Tensor, dtype: torch.dtype) -> float:
    """Give ||B A - B' A'||_F / ||B A||_F for factors stored in `dtype`. Singular values below that share are storage noise.

    Computed from the factors [B - B', B'] and [A; A - A'], so that nothing cancels. NaN for B A = 0.
    """
    A, B = wide(A), wide(B)
    dA, dB = A - wide(A.to(dtype)), B - wide(B.to(dtype))
    size = spectrum.frobenius(spectrum.core(A, B).flatten())
    lost = spectrum.core(torch.cat([A, dA]), torch.cat([dB, B - dB], dim=1))
    return spectrum.frobenius(lost.flatten()) / size if size else math.nan


def storage_floor(dtype: torch.dtype) -> float:
    """Give the relative Frobenius error to expect of B A stored in `dtype`: sqrt2 rms(ulp) / sqrt12 for normal entries.

    0.0024 for bfloat16, 0.0003 for float16. For factors that are in that dtype already, where the loss cannot be measured.
    """
    quantiles = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    x = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    return math.sqrt(2 * float(ulp(x, dtype).square().mean() / x.square().mean()) / 12)


def _as_tensor(t: Tensor | float) -> Tensor:
    return wide(torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t)


def _summed(t: Tensor | float) -> tuple[Tensor, Tensor]:
    """Give (c, m) by their sums up to t = SMOOTH, beyond it by their limits."""
    t = _as_tensor(t)
    within = t.clamp(1e-12, SMOOTH)
    edges = (torch.arange(math.ceil(9 * SMOOTH), dtype=t.dtype, device=t.device) + 0.5) / within[..., None]
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    weights = torch.arange(1, 2 * edges.shape[-1], 2, dtype=t.dtype, device=t.device)
    c = 2 / within * density.sum(-1)
    m = (weights * torch.erfc(edges / math.sqrt(2))).sum(-1)  # 2 Q(x) = erfc(x / sqrt2)
    limit = t > SMOOTH
    return torch.where(limit, torch.ones_like(c), c), torch.where(limit, t.square() + 1 / 12, m)
