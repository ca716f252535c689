"""The adapter of AdapterFusion. Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00247

    y' = y + U·f(D·y + c) + e        y = W x + b: the layer's output   D: (m, out)   U: (out, m)   c: (m,)   e: (out,)

One in a block instead of Houlsby's two, after the feed-forward network, with m a fraction of the model's width. So
target its second layer:

    BERT      target_modules=["output.dense"], exclude_modules=["attention.output.dense"]
    Llama     target_modules=["down_proj"]
    GPT-2     target_modules=["mlp.c_proj"]

Departures from the paper: there the adapter reads the output of the layer norm after the residual, which is no part of
a linear layer; here it reads the layer's own output, before the residual. U and e start at zero, so that the start is
the base model to the last bit. The fusion of several adapters is not here. It cannot be merged (there is a nonlinearity
in it).

When: as the one before it, with one bottleneck a block and so half of the cost. It stays beside the model: it cannot
be merged.
"""

from dataclasses import dataclass

from ..core.adapter import Shape
from ._bottleneck import Activation, SerialBottleneck, check


@dataclass(frozen=True, kw_only=True)
class Pfeiffer:
    """A bottleneck after the layer; the paper's are after the last layer of the feed-forward network.

    reduction_factor: number of the layer's outputs over the width m, which is at least 1
    activation: nonlinearity f
    """

    reduction_factor: float = 16.0
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        check(self.activation, reduction_factor=self.reduction_factor)

    def build(self, shape: Shape) -> SerialBottleneck:
        """Make the adapter of one layer."""
        size = max(1, round(shape.out_features / self.reduction_factor))
        return SerialBottleneck(self, shape, size, self.activation)


METHOD = Pfeiffer
