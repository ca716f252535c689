"""What shipping an adapter does to it: T40 to T42."""

import math

import torch

from .. import activation, replication, rounding, subspace
from .. import spectrum as sp
from .outcome import Outcome, Where, largest


def off_grid(where: Where) -> Outcome:
    """T40: rounding W + ΔW and W, both off the grid of bfloat16, against the closed form; the change is right on average."""
    W = 1.0 + 0.998 * where.rand(512, 1024, seed=30)  # one binade: every ulp is 2^-7
    expected, measured = [], []
    for t in (0.05, 0.3, 1.5):
        delta = t * 2.0**-7 * where.randn(512, 1024, seed=31)
        left = (W + delta).to(torch.bfloat16).double() - W.to(torch.bfloat16).double()
        one = torch.ones(1, dtype=torch.float64)
        expected += list(rounding.predict_off_grid(t * 2.0**-7, one * 2.0**-7, one))
        measured += list(rounding.compare(left, delta))
    return Outcome(tuple(expected), tuple(measured), tolerance=0.03)


def best_in_output(where: Where) -> Outcome:
    """T41: the activation-aware X has the error sum μ_i^2, no other of its rank less, and Σ = 1 gives the truncated SVD."""
    A, B, X = where.randn(6, 20, seed=32), where.randn(24, 6, seed=33), where.randn(40, 20, seed=34)
    X = X * torch.linspace(0.05, 3, 20, dtype=X.dtype, device=X.device)
    delta, moment = sp.svd(A, B, 0.5), X.T @ X / len(X)
    found = activation.seen(delta, moment)
    dense = 0.5 * (B @ A).double()
    ours, plain = (0.25 * b @ a for a, b in (activation.truncated(delta, found, 2, 0.25), sp.truncated(delta, 2, 0.25)))
    errors = [float(((dense - own) @ X.double().T).norm()) / math.sqrt(len(X)) for own in (ours, plain)]
    eye = torch.eye(20, dtype=X.dtype, device=X.device)
    a, b = activation.truncated(delta, activation.seen(delta, eye), 2, 0.25)
    measured = (
        errors[0],
        activation.output_norm(delta, moment),
        largest(0.25 * b @ a - plain),
        float(errors[1] > errors[0]),
    )
    expected = (float(found.mu[2:].norm()), float(found.mu.norm()), 0.0, 1.0)
    return Outcome(expected, measured)


def shared_directions(where: Where) -> Outcome:
    """T42: of two subspaces with 2 of 6 directions in common exactly these replicate, of random ones none; interference."""
    n, common = 200, where.basis(200, 2, seed=35)
    one, other = (torch.linalg.qr(torch.cat([where.randn(n, 4, seed=s), common], 1).double())[0] for s in (36, 37))
    null = replication.largest_by_chance(n, 6, 6)
    draws = [
        subspace.principal_cosines(where.basis(n, 6, seed=2 * i), where.basis(n, 6, seed=2 * i + 1))[0]
        for i in range(400)
    ]
    chance = float(torch.stack(draws).square().mean())
    A, B = where.randn(3, 30, seed=38), where.randn(20, 3, seed=39)
    inner = subspace.cosine(sp.svd(A, B), sp.svd(A, -2 * B))
    apart = replication.replicated(where.basis(n, 6, seed=40), where.basis(n, 6, seed=41)).count
    measured = (float(replication.replicated(one, other).count), float(apart), inner, (chance - null.mean) / null.mean)
    return Outcome((2.0, 0.0, -1.0, 0.0), measured, tolerance=0.06)
