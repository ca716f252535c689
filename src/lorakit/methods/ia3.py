"""IA3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning. Liu et al. 2022,
https://arxiv.org/abs/2205.05638

    W' = diag(l) W, b' = l ⊙ b    l: (out,) on the output of the attention's keys and values
    W' = W diag(l)                l: (in,) on the input of a feed-forward block's second layer, its hidden activations

l starts at 1. Target k, v and the second layer of the feed-forward block (`target_modules: [k_proj, v_proj, down_proj]`);
which of the targets are the latter is said by name, or known by name.

Departures from the paper: of a decoder-only block the same three places, as in PEFT.

When: there are few examples, or thousands of adapters: one number a channel, and next to no work. It only turns
channels up and down, and cannot make a layer read a direction that it does not read yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, Base, PeftFormat, Shape
from ..core.errors import UsageError
from ..core.pattern import is_suffix
from ..core.statistics import Statistics

SECOND_LAYERS = (
    "down_proj",  # Llama, Mistral, Qwen, Gemma, SmolLM
    "wo",  # T5
    "mlp.Wo",  # ModernBERT
    "mlp.c_proj",  # GPT-2, GPT-Neo
    "mlp.fc_out",  # GPT-J
    "fc2",  # OPT, BART, Phi, ViT of CLIP
    "dense_4h_to_h",  # GPT-NeoX, BLOOM, Falcon
    "output.dense",  # BERT, RoBERTa, ViT
    "ffn.lin2",  # DistilBERT
)
OTHERS = ("attention.output.dense",)  # BERT's output of the attention, which ends like that of the feed-forward block


@dataclass(frozen=True, kw_only=True)
class IA3:
    """Learned gains of channels. It wants a learning rate of 1e-3 to 1e-2.

    feedforward_modules: the targets whose input is scaled, in the forms of `target_modules`; where it is not given, those
        that common models name as the second layer of a feed-forward block (down_proj, wo, fc2, mlp.c_proj ...)
    """

    feedforward_modules: str | tuple[str, ...] | None = None

    SELECTS: ClassVar[str] = "feedforward_modules"
    PEFT: ClassVar = PeftFormat(
        "IA3",
        tensors={"ia3_l": "ia3_l"},
        fields={"feedforward_modules": "feedforward_modules"},
        ignored={"init_ia3_weights": True},
    )

    def __post_init__(self) -> None:
        given = self.feedforward_modules
        if given is None or isinstance(given, str):
            return
        if not all(isinstance(name, str) and name for name in given):
            raise UsageError(f"feedforward_modules must be names of layers, not {given!r:.100}")
        object.__setattr__(self, "feedforward_modules", tuple(given))  # of a list: it must be hashable

    def on(self, path: str, selected: bool | None) -> "IA3OnLayer":
        """Give the method for the layer at `path`, on its input if it is a feed-forward one."""
        if selected is None:
            selected = _ends(path, SECOND_LAYERS) and not _ends(path, OTHERS)
        return IA3OnLayer(self, selected)

    def build(self, shape: Shape) -> "IA3Adapter":
        """Make the adapter of a layer without a name, on its output."""
        return IA3Adapter(self, shape, selected=False)


@final
class IA3OnLayer:
    """IA3 on the input (`selected`) or on the output of a layer."""

    def __init__(self, config: IA3, selected: bool) -> None:
        self.config, self.selected = config, selected

    def build(self, shape: Shape) -> "IA3Adapter":
        """Make the adapter. Raises UsageError for the input of an embedding."""
        if self.selected and shape.one_hot:
            raise UsageError(
                "IA3 cannot scale the input of an embedding",
                why="the input is token ids",
                fix="take the embedding out of feedforward_modules: then its output is scaled",
            )
        return IA3Adapter(self.config, shape, selected=self.selected)


@final
class IA3Adapter(AbstractAdapter):
    """The gains of one layer: a column (out, 1), or, of the input, a row (1, input channels)."""

    ROLES: ClassVar[Mapping[str, str]] = {"ia3_l": "magnitude"}

    def __init__(self, config: IA3, shape: Shape, *, selected: bool) -> None:
        super().__init__()
        self.config, self.selected, self.kernel = config, selected, shape.kernel
        size = (1, shape.in_features // shape.kernel) if selected else (shape.out_features, 1)
        self.ia3_l = nn.Parameter(torch.empty(size))

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer."""
        nn.init.ones_(self.ia3_l)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Scale what goes into the frozen layer, or what comes out of it with its bias."""
        gain = self.ia3_l.flatten()
        if self.selected:
            return base.frozen(x * base.input_channels(gain.to(x.dtype)))
        y = base.frozen(x)
        return y * base.channels(gain.to(y.dtype))

    def merge(self, weight: Tensor) -> Tensor:
        """Scale the columns, of a convolution those of each channel alike, or the rows."""
        gain = self.ia3_l.to(weight.dtype)
        return weight * (gain.repeat_interleave(self.kernel, 1) if self.selected else gain)

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        """Scale the bias with the output."""
        return bias if bias is None or self.selected else bias * self.ia3_l.flatten().to(bias.dtype)


def _ends(path: str, names: tuple[str, ...]) -> bool:
    return any(is_suffix(name, path) for name in names)


METHOD = IA3
