"""Adapters: Parameter-Efficient Transfer Learning for NLP. Houlsby et al. 2019, https://arxiv.org/abs/1902.00751

    y' = y + U·f(D·y + c) + e        y = W x + b: the layer's output   D: (m, out)   U: (out, m)   c: (m,)   e: (out,)

The paper puts one after each of a block's two projections back to the model's width, before the residual is added. So
target exactly these:

    BERT      target_modules=["attention.output.dense", "output.dense"]
    Llama     target_modules=["o_proj", "down_proj"]
    GPT-2     target_modules=["attn.c_proj", "mlp.c_proj"]

and, as the paper does, train the layer norms: modules_to_save=["LayerNorm"] (BERT), ["input_layernorm",
"post_attention_layernorm"] (Llama), ["ln_1", "ln_2"] (GPT-2).

Departures from the paper: U and e start at zero instead of near it, so that the start is the base model to the last
bit. There is a nonlinearity between D and U, so it cannot be merged, and costs two more products per layer at
inference.

When: results from before LoRA are to be reproduced, or a nonlinear change is wanted. It costs two more products after
each adapted layer in every pass, for good: it cannot be merged.
"""

from dataclasses import dataclass

from ..core.adapter import Shape
from ._bottleneck import Activation, SerialBottleneck, check


@dataclass(frozen=True, kw_only=True)
class Houlsby:
    """A bottleneck after the layer; the paper's are after the last layers of attention and feed-forward network.

    bottleneck: width m
    activation: nonlinearity f
    """

    bottleneck: int = 64
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        check(self.activation, bottleneck=self.bottleneck)

    def build(self, shape: Shape) -> SerialBottleneck:
        """Make the adapter of one layer."""
        return SerialBottleneck(self, shape, self.bottleneck, self.activation)


METHOD = Houlsby
