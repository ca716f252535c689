"""What an adapter is: a trainable map `W -> merge(W)` and a cheap way to run the layer whose weight is `merge(W)`.

Every class is either abstract or final, and an implemented method is never overridden: a reader who sees
`adapter.merge(W)` has one place to look.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, Self, final, runtime_checkable

from torch import Tensor, nn

from ..kernels.low_rank import Change, LowRank, add, applies
from .statistics import Statistics


class Shape(NamedTuple):
    """The shape (out, in) of a layer's matrix. `one_hot`: the layer's input selects columns of it (an embedding)."""

    out_features: int
    in_features: int
    one_hot: bool = False
    bias: bool = True
    """Whether the layer has a bias (out,) too."""
    kernel: int = 1
    """Entries of a convolution's kernel: `in_features` is its input channels times this."""


class Base(Protocol):
    """The frozen layer as an adapter sees it. Its matrix W is (out, in) whatever the layer's kind (`kinds.py`).

    `frozen(x) = plus_bias(linear(x))` and `linear(x) = project(x, matrix())`.
    """

    VECTORS: bool
    """Whether the layer multiplies each vector of its input (..., in) by W."""

    def frozen(self, x: Tensor) -> Tensor:
        """Run the layer as it was before anything was attached."""
        ...

    def linear(self, x: Tensor) -> Tensor:
        """Run the layer without its bias."""
        ...

    def plus_bias(self, y: Tensor) -> Tensor:
        """Add the layer's bias, if it has one."""
        ...

    def without_bias(self, y: Tensor) -> Tensor:
        """Take the layer's bias off again, if it has one."""
        ...

    def matrix(self) -> Tensor:
        """Give W (out, in), dequantized if it is stored in fewer bits."""
        ...

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Run the layer's own linear map with another matrix (k, in): k output channels, no bias."""
        ...

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        """Mix the k channels of an output of this layer's form into `out` channels by a matrix (out, k)."""
        ...

    def channels(self, v: Tensor) -> Tensor:
        """Shape a vector (out,) so that it broadcasts over the channels of this layer's output."""
        ...

    def input_channels(self, v: Tensor) -> Tensor:
        """Shape a vector over the input's channels so that it broadcasts over this layer's input."""
        ...


class AbstractAdapter(nn.Module, ABC):
    """A change of one weight matrix. The one law, tested for every method, layer kind and storage format:

        adapter(x, base) == base.project(x, adapter.merge(base.matrix())) + adapter.merge_bias(bias)

    A method that cannot be folded into the weight (it is not linear in x, or looks at more than one token) raises UsageError
    with the reason in `merge`; `mergeable()` says so beforehand.
    """

    MERGEABLE: ClassVar[bool] = True

    ROLES: ClassVar[Mapping[str, str]]
    """Role of each own parameter for the optimizer: "A", "B", "magnitude", "bias", "base" (a weight trained in full), "frozen"."""

    FAST_IN_EMBEDDING: ClassVar[str] = "B"
    """Role of the factor that starts at zero on an embedding, and so gets LoRA+'s higher rate there; elsewhere it is B."""

    config: Any
    """The hyper-parameters this adapter was built with, its own rank and alpha after the patterns."""

    selected: bool = False
    """Whether the layer is one of those that a `Selective` method treats in its other way."""

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers in training by other means than `nn.Dropout`."""
        return False

    @abstractmethod
    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Fill the parameters with their start values. `statistics` are what was measured of this layer, if anything."""

    @abstractmethod
    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Run the layer whose matrix is `merge(base.matrix())`."""

    @abstractmethod
    def merge(self, weight: Tensor) -> Tensor:
        """Give the adapted matrix (out, in) for the base matrix (out, in), in the dtype of `weight`."""

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        """Give the adapted bias (out,) for the base's; most methods leave it alone."""
        return bias

    def mergeable(self) -> bool:
        """Whether there is a matrix and a bias that do what this adapter does."""
        return self.MERGEABLE

    def low_rank(self, base: Base) -> LowRank | None:
        """Give the factors, if `merge(W)` is gain (W + scale B A) with gradients through them; None if it is anything else."""
        return None

    def routed(self, base: Base) -> Change | None:
        """Give what a fused operation adds to the layer: the factors, or those of several adapters for rows of their own."""
        return self.low_rank(base)

    def compact(self) -> "AbstractAdapter":
        """Give the adapter as it is saved: itself, or a smaller one that computes the same (AdaLoRA's, when pruned)."""
        return self

    def shared_tensors(self) -> dict[str, Tensor]:
        """Give the tensors outside the state dict that all layers' adapters hold, to be saved once (VeRA's projections)."""
        return {}

    def roles(self) -> dict[str, str]:
        """Give each of this adapter's parameter names its role; a name without a role is a mistake in the method."""
        return {name: self.ROLES[name.rpartition(".")[2]] for name, _ in self.named_parameters()}


class AdditiveAdapter(AbstractAdapter):
    """`merge(W) = W + delta_weight()`: LoRA, VeRA, AdaLoRA, LoHa and most others."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """Give the change of the matrix, (out, in)."""

    @abstractmethod
    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give the change of the layer's output: `base.project(x, delta_weight())`, computed cheaply."""

    @final
    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Add the change to the frozen layer's output; in training in one operation, where there is one.

        In evaluation the order of additions is that of other tools, and a start that is taken off again cancels exactly.
        """
        y = base.frozen(x)
        if (
            self.training
            and base.VECTORS
            and applies(x)
            and x.dtype == y.dtype
            and (change := self.low_rank(base)) is not None
        ):
            return add(y, x, change)
        return y + self.delta(x, base).to(y.dtype)

    @final
    def merge(self, weight: Tensor) -> Tensor:
        """Add `delta_weight()` in the dtype of `weight`."""
        return weight + self.delta_weight().to(weight.dtype)


@dataclass(frozen=True)
class PeftFormat:
    """How PEFT spells a method. `interop` does the rest: key prefixes, the other layer kinds, strictness.

    tensors: own parameter name -> name in the file, after the layer's path (as on a Linear layer).
    fields: own hyper-parameter -> field of `adapter_config.json`.
    constants: fields with a fixed value, by which methods that share a `peft_type` are told apart.
    values: own hyper-parameter -> {value in `adapter_config.json`: own value}, where they differ; the first is written.
    ignored: fields that change nothing about what the tensors compute; written with these values, read with any.
    marked_by: a field that is set for this method and for no other of the same `peft_type`.
    masked: (tensor, own field) where PEFT's `rank_pattern` is no pattern of ranks but, by tensor, a list of booleans
        that says which of its rows are in the file; the field is the length of that list.
    only_with_side_file: to PEFT this is another method; `lorakit.json` alone tells them apart.
    """

    peft_type: str
    tensors: Mapping[str, str]
    fields: Mapping[str, str]
    values: Mapping[str, Mapping[Any, object]] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    ignored: Mapping[str, object] = field(default_factory=dict)
    marked_by: str | None = None
    masked: tuple[str, str] | None = None
    only_with_side_file: bool = False


@runtime_checkable
class Method(Protocol):
    """The hyper-parameters of one method: a frozen dataclass in a file of `methods/`, saved as JSON beside the tensors."""

    def build(self, shape: Shape) -> AbstractAdapter:
        """Make the adapter of one layer, parameters not yet filled (`start` or loading does that)."""
        ...


@runtime_checkable
class Sharing(Protocol):
    """A method whose layers share tensors (VeRA): it sees all shapes before the first layer is built."""

    def shared(self, shapes: Sequence[Shape]) -> Method:
        """Give the method that builds the layers of one attachment, holding what they share."""
        ...


@runtime_checkable
class Resizable(Protocol):
    """A method with a rank, so that `rank_pattern` can apply to it."""

    r: int

    def at(self, r: int, alpha: float | None) -> Self:
        """Give the same method with another rank, and another scale if it has one."""
        ...


class Ranked(Resizable, Protocol):
    """A method with a scale too, so that `alpha_pattern` can apply to it."""

    alpha: float | None


@runtime_checkable
class Selective(Protocol):
    """A method that treats some layers in another way (IA3): a field names them, in the forms of `target_modules`."""

    SELECTS: ClassVar[str]
    """The field. Where it is None, the method knows such layers by their names."""

    def on(self, path: str, selected: bool | None) -> Method:
        """Give the method for the layer at `path`; `selected`: whether the field names it, None if the field is None."""
        ...
