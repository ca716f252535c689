"""A micro-batch by several threads, each with rows of its own: its gradient in training, its loss in an evaluation.

    loss = sum of the shares' losses      gradient = sum of the shares' gradients, in the order of the shares

Threads inside an operation wait for each other at every one of a step's thousands of operations: two cores then do 1.2 to 1.4
times the work of one. Rows have nothing to do with each other until their losses are added, so here each thread takes its share
of them through the whole model and back, by operations of one thread: 1.6 to 1.7 times. Which rows are whose depends on their lengths and
the number of threads alone, and the sum has one order, so a run is the same bit for bit every time.

Only where nothing in the model remembers a pass or draws random numbers (`Fast.separable`), on a processor.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.threads import for_each_of, threads

Row = TypeVar("Row")
Result = TypeVar("Result")
Part = tuple[float, tuple[Tensor | None, ...]]
"""The loss of a share, and its gradient."""

LARGEST = 1.35  # times its fair part, a share is too large: the others would wait longer than they save


def share_out(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Deal rows of these lengths out to at most `count` shares of about equal length: the longest first, to the shortest share.

    Gives the rows' places. All in one share, if shares of equal length cannot be made.
    """
    shares: list[list[int]] = [[] for _ in range(min(count, len(lengths)))]
    totals = [0] * len(shares)
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = totals.index(min(totals))
        shares[least].append(place)
        totals[least] += lengths[place]
    if len(shares) < 2 or max(totals) * len(shares) > LARGEST * sum(totals):
        return share_out(lengths, count - 1) if count > 2 else [list(range(len(lengths)))]
    return [sorted(share) for share in shares]


def threads_each(shares: int) -> int:
    """Give the number of threads for the operations of each share."""
    return max(1, torch.get_num_threads() // shares)


class Team:
    """Threads that stay, so that what torch keeps for each is made once. count: with the caller's own."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count - 1, "lorakit-share") if count > 1 else None

    def each(self, work: Callable[[Sequence[Row]], Result], shares: Sequence[Sequence[Row]]) -> list[Result]:
        """Give what `work` makes of each share, in their order; each share has a thread of its own."""
        if self._pool is None or len(shares) == 1:
            return [work(share) for share in shares]
        count = threads_each(len(shares))

        def alone(share: Sequence[Row]) -> Result:
            torch.set_num_threads(count)  # of the operations that this thread asks for
            return work(share)

        with threads(count):
            others: list[Future[Any]] = [self._pool.submit(copy_context().run, alone, share) for share in shares[1:]]
            try:
                first = alone(shares[0])
            finally:
                wait(others)  # what they use must not go away under them
            return [first, *(other.result() for other in others)]

    def backward(
        self,
        loss: Callable[[Sequence[Row]], Tensor],
        shares: Sequence[Sequence[Row]],
        weight: int,
        parameters: Sequence[nn.Parameter],
    ) -> float:
        """Add the gradient of `loss` / weight, summed over the shares, to the parameters' own; give the sum of `loss`."""
        if self._pool is None or len(shares) == 1:
            (whole,) = shares
            own = loss(whole)
            (own / weight).backward()
            return float(own.detach())
        trained = [p for p in parameters if p.requires_grad]

        def differentiate(share: Sequence[Row]) -> Part:
            own = loss(share)
            return float(own.detach()), torch.autograd.grad(own / weight, trained, allow_unused=True)

        results = self.each(differentiate, shares)
        add_gradients(trained, [gradients for _, gradients in results])
        return sum(own for own, _ in results)


@torch.no_grad()
def add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Sequence[Tensor | None]]) -> None:
    """Add the shares' gradients up, in their order, and to what is there."""
    with for_each_of(parameters):
        for own in gradients:
            with_gradient = [(p, g) for p, g in zip(parameters, own, strict=True) if g is not None]
            there = [(p.grad, g) for p, g in with_gradient if p.grad is not None]
            if there:
                torch._foreach_add_(*map(list, zip(*there, strict=True)))
            for p, g in with_gradient:
                if p.grad is None:  # laid out as its parameter: fused optimizers take that for granted
                    p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
