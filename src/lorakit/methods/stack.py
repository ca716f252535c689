"""Several methods on the same layers: LoRA and a bottleneck, LoRA and biases, DoRA and a bottleneck. He et al. 2021,
https://arxiv.org/abs/2110.04366, find that such mixtures of methods do better than each alone.

    W' = merge_2(merge_1(W))        y = adapter_2(x, the layer with adapter_1)

    method:
      name: stack
      parts: [{name: lora, r: 8}, {name: bitfit}]

It can be merged if all its parts can. What it is, is in `core/stack.py`; all parts act on all targeted layers.

When: two methods learn what neither can alone, as a change of the weights and one of the biases. It costs what its
parts cost together.
"""

from ..core.stack import Stack

METHOD = Stack
