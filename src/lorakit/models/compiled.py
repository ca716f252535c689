"""Blocks compiled one by one by torch.compile, for micro-batches of fixed sizes (`train/fixed.py`).

One block and not the model: all blocks share one compiled program for each size, so compiling takes the time of a block and not
of thirty. Compiled is transformers' own forward with the adapters in it; torch.compile fuses what `blocks.py` fuses by
hand. Which of the two is faster is a question to the machine at hand: hence an option.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .blocks import FastBlock

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def compiled_blocks(model: "PreTrainedModel", backend: str = "inductor") -> Generator[int]:
    """Let the fast blocks of `model` train compiled, inside `with`, where sizes are fixed; give their number."""
    blocks = [block for block in model.modules() if isinstance(block, FastBlock)]
    for block in blocks:
        block.compiled = _compiled(block, backend)
    try:
        # All blocks are one piece of code: a program for each size, twice (the first block's input needs no gradient), more where
        # blocks differ in their window. Over its limit torch would run the rest uncompiled and only log it.
        with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            yield len(blocks)
    finally:
        for block in blocks:
            block.compiled = None


def _compiled(block: FastBlock, backend: str) -> Any:
    plain = vars(type(block))["__plain_class__"].forward
    run = torch.compile(plain.__get__(block), backend=backend, dynamic=False)

    def forward(x: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        return run(x, **kwargs)  # where documents end says what the mask would

    return forward
