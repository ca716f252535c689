"""The order of the rows, a pure function of (seed, epoch): an epoch's plan is made anew, so resuming skips nothing.

A plan is a list of micro-batches, each a list of row indices. A window of `accumulate` micro-batches is one optimizer
step; the last window of an epoch may be shorter. The state of the data is the position (epoch, window), nothing else.
"""

from collections.abc import Sequence

import torch

from ..core.errors import UsageError

Plan = list[list[int]]


def permutation(seed: int, epoch: int, count: int) -> list[int]:
    """Give the order of `count` rows in an epoch."""
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + 1) % 2**63  # near seeds and epochs far apart
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed)).tolist()


def epoch_plan(
    seed: int, epoch: int, lengths: Sequence[int], batch_size: int | None = None, batch_tokens: int | None = None
) -> Plan:
    """Give the micro-batches of an epoch: `batch_size` rows each, or as many as fit into `batch_tokens` tokens.

    Each row is in exactly one micro-batch; a row longer than the budget is one by itself. Raises UsageError unless
    exactly one of the two is given.
    """
    if (batch_size is None) == (batch_tokens is None) or (batch_size or batch_tokens or 0) < 1:
        raise UsageError(
            f"batch_size {batch_size} and batch_tokens {batch_tokens}", fix="give one of the two, 1 or more"
        )
    order = permutation(seed, epoch, len(lengths))
    if batch_size is not None:
        return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    return _fill(order, lengths, batch_tokens or 0)


def windows(plan: Plan, accumulate: int = 1) -> list[Plan]:
    """Group the micro-batches of an epoch into optimizer steps."""
    if accumulate < 1:
        raise UsageError(f"accumulate {accumulate}", fix="give 1 or more")
    return [plan[begin : begin + accumulate] for begin in range(0, len(plan), accumulate)]


def steps_per_epoch(
    seed: int,
    epoch: int,
    lengths: Sequence[int],
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    accumulate: int = 1,
) -> int:
    """Count the optimizer steps of an epoch; with `batch_tokens` epochs can differ by a few."""
    return -(-len(epoch_plan(seed, epoch, lengths, batch_size, batch_tokens)) // accumulate)


def _fill(order: Sequence[int], lengths: Sequence[int], budget: int) -> Plan:
    plan: Plan = []
    used = budget  # the first row opens a batch
    for row in order:
        if used + lengths[row] > budget:
            plan.append([])
            used = 0
        plan[-1].append(row)
        used += lengths[row]
    return plan
