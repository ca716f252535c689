"""What a statistic of ΔW = B·A is for random factors of the same shape: the value that means "nothing to see".

For Gaussian B (d, r) and A (r, k) the core R_B R_A^T can be drawn without the factors (Bartlett's decomposition): R is upper
triangular with independent entries, R_ii ~ chi(d - i) for i = 0 .. r-1 and normal above the diagonal. So a null costs
O(r^3), whatever d and k. A's real start is uniform, not normal; at model sizes the spectra agree. Bartlett 1933; Muirhead,
Aspects of Multivariate Statistical Theory, theorem 3.2.14.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import spectrum

DRAWS, SEED = 32, 0


class Null(NamedTuple):
    """Means over draws of random factors of one shape; the spectrum is scaled to ||ΔW||_F = 1."""

    stable_rank: float
    effective_rank: float
    participation: float
    energy_rank_90: float
    energy_rank_99: float
    condition: float
    spectrum: tuple[float, ...]


@functools.lru_cache(maxsize=512)
def random_factors(d: int, k: int, r: int) -> Null:
    """Give the null for ΔW (d, k) = B·A of rank r: the same numbers in every process (the draws are seeded)."""
    generator = torch.Generator().manual_seed(SEED)
    spectra = []
    for _ in range(DRAWS):
        R_B, R_A = _triangle(d, r, generator), _triangle(k, r, generator)
        S = torch.linalg.svdvals(R_B @ R_A.T)
        spectra.append(S / torch.linalg.vector_norm(S))
    return Null(
        _mean([spectrum.stable_rank(S) for S in spectra]),
        _mean([spectrum.effective_rank(S) for S in spectra]),
        _mean([spectrum.participation(S) for S in spectra]),
        _mean([spectrum.energy_rank(S, 0.9) for S in spectra]),
        _mean([spectrum.energy_rank(S, 0.99) for S in spectra]),
        _mean([spectrum.condition(S, d, k) for S in spectra]),
        tuple(torch.stack(spectra).mean(0).tolist()),
    )


def noise_condition(d: int, r: int) -> float:
    """Give σ_1/σ_r of a Gaussian (d, r), (1 + sqrt(r/d)) / (1 - sqrt(r/d)): B after a random walk. Needs r < d."""
    x = (r / d) ** 0.5
    return (1 + x) / (1 - x)


def _triangle(rows: int, r: int, generator: torch.Generator) -> Tensor:
    """Draw R of the thin QR of a Gaussian (rows, r); with rows < r the Gaussian itself, which is as small."""
    normal = torch.randn(min(rows, r), r, generator=generator, dtype=torch.float64)
    if rows < r:
        return normal
    freedom = torch.arange(rows, rows - r, -1, dtype=torch.float64)
    # chi^2 with n degrees of freedom is Gamma(n/2, 1/2); torch's gamma takes a generator only through _standard_gamma.
    chi = (2 * torch._standard_gamma(freedom / 2, generator=generator)).sqrt()
    return normal.triu(1) + chi.diag()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
