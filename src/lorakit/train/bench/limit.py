"""What the machine could do at best: the matrix products that training through frozen weights cannot do without.

A row of activations x (in) and a frozen W (out, in) take 2 in·out operations forward (x W^T) and as many backward (dy W,
no dW): 4 operations per weight and token. The head counts only for tokens that predict a trained one. Left out are
attention, norms, the adapter, the optimizer: at the limit they would be free.
"""

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .work import Work

LEAST_SECONDS = 0.02  # a product is repeated for at least this long


class Product(NamedTuple):
    """`count` frozen matrices (out, in), each multiplied by `rows` rows of activations, forward and backward."""

    out: int
    inner: int
    rows: int
    count: int

    @property
    def flops(self) -> int:
        """Operations of all of them: 4 per weight and row."""
        return 4 * self.out * self.inner * self.rows * self.count


def products(model: "PreTrainedModel", tokens: int, labelled: int) -> list[Product]:
    """Give the products of one step of a causal model (a skeleton will do); its head sees `labelled` rows."""
    head = model.get_output_embeddings()
    shapes = Counter(
        (m.out_features, m.in_features) for m in model.modules() if isinstance(m, nn.Linear) and m is not head
    )
    found = [Product(*shape, tokens, count) for shape, count in shapes.items()]
    if isinstance(head, nn.Linear):
        found.append(Product(head.out_features, head.in_features, labelled, 1))
    return found


def measure_limit(work: "Work") -> dict[str, Any]:
    """Measure the rate of this machine, with the threads torch has now, at the shapes of the work's model.

    Gives flops of a step, seconds at the limit, and the rate in flops/s.
    """
    from ...models.resolve import resolve
    from ...models.skeleton import skeleton

    labelled = work.batch * sum(work.trained())
    needed = products(skeleton(Path(resolve(work.model)), dtype=work.dtype), work.tokens, labelled)
    seconds = sum(product_seconds(product, getattr(torch, work.dtype), work.device) for product in needed)
    flops = sum(product.flops for product in needed)
    return {"flops": flops, "seconds": seconds, "rate": flops / seconds}


@torch.no_grad()
def product_seconds(product: Product, dtype: torch.dtype, device: str = "cpu") -> float:
    """Measure the seconds that the product takes in all its layers, forward and backward: the best of several tries."""
    weight, x, dy = (
        torch.randn(shape, dtype=dtype, device=device)
        for shape in ((product.out, product.inner), (product.rows, product.inner), (product.rows, product.out))
    )
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    forward = _best(lambda: (torch.mm(x, weight.T, out=y), wait()))
    backward = _best(lambda: (torch.mm(dy, weight, out=dx), wait()))
    return product.count * (forward + backward)


def _best(function: Any) -> float:
    """Give the shortest time of one call; the first call only warms up."""
    function()
    best, spent, calls = float("inf"), 0.0, 0
    while spent < LEAST_SECONDS or calls < 3:
        began = time.perf_counter()
        function()
        seconds = time.perf_counter() - began
        best, spent, calls = min(best, seconds), spent + seconds, calls + 1
    return best
