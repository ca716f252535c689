"""How many directions two subspaces have in common beyond chance: the data-supported part of two adapters' ranks.

The principal cosines of two subspaces do not depend on the order of their directions, and shared directions show as cosines
near 1 whatever the rest does; the sum φ of their squares cannot tell 2 shared directions of 4 from 4 half-shared ones. They are
tested one after the other: the largest against the largest of random subspaces; what passes is taken out of both subspaces and
of the space, and the next one is tested in what is left. The count ends at the first one that chance could give.

The null: of independent random subspaces of dimensions i <= j in n the squared cosines are the eigenvalues of X (X + Y)^-1, X
and Y Wishart (i x i) of j and n - j degrees of freedom. Both are drawn by Bartlett's decomposition, so a null costs O(i^3).
Muirhead, Aspects of Multivariate Statistical Theory, theorem 3.3.1.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .subspace import principal_cosines

DRAWS, SEED, DEVIATIONS = 256, 0, 3.0


class Largest(NamedTuple):
    """Mean and deviation of the largest squared principal cosine of random subspaces."""

    mean: float
    sd: float

    @property
    def edge(self) -> float:
        """Give what chance hardly exceeds: the mean plus three deviations."""
        return self.mean + DEVIATIONS * self.sd


class Replicated(NamedTuple):
    """count: directions in common beyond chance. cosines: all, descending. edge: the squared cosine the first had to exceed."""

    count: int
    cosines: Tensor
    edge: float


def replicated(U1: Tensor, U2: Tensor) -> Replicated:
    """Count the principal cosines of orthonormal U1 (n, i), U2 (n, j) that random subspaces would not have."""
    (n, i), j = U1.shape, U2.shape[1]
    cosines, count = principal_cosines(U1, U2), 0
    while count < len(cosines) and float(cosines[count]) ** 2 > largest_by_chance(n - count, i - count, j - count).edge:
        count += 1
    return Replicated(count, cosines, largest_by_chance(n, i, j).edge if len(cosines) else 1.0)


@functools.lru_cache(maxsize=4096)
def largest_by_chance(n: int, i: int, j: int) -> Largest:
    """Give the null for subspaces of dimensions i and j in n: the same in every process (the draws are seeded).

    With i + j > n they meet for certain: the largest cosine is 1, and nothing can be said.
    """
    i, j = sorted((i, j))
    if i + j > n:
        return Largest(1.0, 0.0)
    generator = torch.Generator().manual_seed(SEED)
    X, Y = _wishart(i, j, generator), _wishart(i, n - j, generator)
    inverse = torch.linalg.inv(torch.linalg.cholesky(X + Y))
    squares = torch.linalg.eigvalsh(inverse @ X @ inverse.mT)[:, -1]
    return Largest(float(squares.mean()), float(squares.std()))


def _wishart(size: int, freedom: int, generator: torch.Generator) -> Tensor:
    """Draw Wishart matrices (draws, size, size), freedom >= size: T T^T, T lower triangular with T_ii ~ chi(freedom - i)."""
    normal = torch.randn(DRAWS, size, size, generator=generator, dtype=torch.float64)
    degrees = torch.arange(freedom, freedom - size, -1, dtype=torch.float64).expand(DRAWS, size)
    chi = (2 * torch._standard_gamma(degrees / 2, generator=generator)).sqrt()
    T = normal.tril(-1) + torch.diag_embed(chi)
    return T @ T.mT
