"""What a layer's matrix is, and how the layer applies one: a mixin per layer kind, chosen by one `singledispatch`.

    kind          weight                 matrix W (out, in)       project(x, M)
    Linear        (out, in)              weight                   x M^T
    Conv1D        (in, out), GPT-2       weight^T                 x M^T
    Embedding     (vocab, dim)           weight^T                 M^T[x]     (the input is one-hot)
    Conv1d/2d/3d  (out, in, *kernel)     weight.flatten(1)        the same convolution with k output channels

A method that uses only these verbs works on every kind. A new kind is a mixin and a `kind_of.register` line.
"""

import sys
from collections.abc import Callable
from functools import partial, singledispatch
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .adapter import Shape
from .errors import UsageError
from .weight import dense, learn, store


class Kind(nn.Module):
    """Verbs of a layer kind, mixed in front of the layer's own class; `self` is the layer."""

    VECTORS: ClassVar[bool] = False
    PRODUCT: ClassVar[bool] = False
    """Whether the layer's own forward is x W^T + b with W as `matrix` gives it, whatever its class."""
    weight: Tensor
    bias: Tensor | None

    def shape(self) -> Shape:
        """Give the shape of the layer's matrix."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """Give W (out, in)."""
        raise NotImplementedError

    @classmethod
    def reader(cls, layer: Any) -> Callable[[], Tensor]:
        """Give what reads the matrix of a layer of this kind for one product: the next reader called may overwrite it."""
        return partial(cls.matrix, layer)

    def laid_out(self, matrix: Tensor) -> Tensor:
        """Give a float tensor in the shape of this layer's weight whose matrix is `matrix`."""
        raise NotImplementedError

    def stored(self, matrix: Tensor) -> Tensor:
        """Give a weight for this layer, in its own shape and storage format, whose matrix is `matrix`."""
        return store(self.weight, self.laid_out(matrix))

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Run the layer's linear map with the matrix (k, in)."""
        raise NotImplementedError

    def input_rows(self, x: Tensor) -> Tensor:
        """Give what the matrix multiplies, one vector a row: (n, in)."""
        return x.reshape(-1, x.shape[-1])

    def output_rows(self, y: Tensor) -> Tensor:
        """Give the channels of the output, one vector a row: (n, out), in the order of `input_rows`."""
        return y.reshape(-1, y.shape[-1])

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        """Mix k channels into `out` channels by the matrix (out, k)."""
        return F.linear(h, matrix)

    def channels(self, v: Tensor) -> Tensor:
        """Shape a per-channel vector for broadcasting; channels are the last dimension."""
        return v

    def input_channels(self, v: Tensor) -> Tensor:
        """Shape a vector over the input's channels for broadcasting; they are its last dimension."""
        return v

    def plus_bias(self, y: Tensor) -> Tensor:
        """Add the layer's bias, if it has one."""
        return y if self.bias is None else y + self.channels(self.bias)

    def without_bias(self, y: Tensor) -> Tensor:
        """Take the layer's bias off again, if it has one."""
        return y if self.bias is None else y - self.channels(self.bias)


class LinearKind(Kind):
    """`nn.Linear` and what derives from it."""

    VECTORS = True
    out_features: int
    in_features: int

    def shape(self) -> Shape:
        """Give (out, in)."""
        return Shape(int(self.out_features), int(self.in_features), bias=self.bias is not None)

    def matrix(self) -> Tensor:
        """Give the weight itself."""
        return dense(self.weight)

    def laid_out(self, matrix: Tensor) -> Tensor:
        """Leave it as it is."""
        return matrix

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Compute x M^T."""
        return F.linear(x, matrix)


class Conv1DKind(Kind):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored transposed."""

    VECTORS = PRODUCT = True

    def shape(self) -> Shape:
        """Give (out, in)."""
        inner, outer = self.weight.shape
        return Shape(outer, inner, bias=self.bias is not None)

    def matrix(self) -> Tensor:
        """Give weight^T."""
        return dense(self.weight).T

    def laid_out(self, matrix: Tensor) -> Tensor:
        """Transpose it."""
        return matrix.T.contiguous()

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Compute x M^T."""
        return F.linear(x, matrix)


class EmbeddingKind(Kind):
    """`nn.Embedding`: token ids in, rows of the weight out. As a matrix it maps one-hot inputs, so W = weight^T."""

    bias = None
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    scale_grad_by_freq: bool

    def shape(self) -> Shape:
        """Give (dim, vocab)."""
        return Shape(int(self.embedding_dim), int(self.num_embeddings), one_hot=True, bias=False)

    def matrix(self) -> Tensor:
        """Give weight^T."""
        return dense(self.weight).T

    def laid_out(self, matrix: Tensor) -> Tensor:
        """Transpose it."""
        return matrix.T.contiguous()

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Look the ids x up in M^T."""
        return F.embedding(x, matrix.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def input_rows(self, x: Tensor) -> Tensor:
        """Refuse: the rows are one-hot, as long as the vocabulary."""
        raise UsageError("an embedding's inputs are token ids, not vectors that could be measured")


class ConvKind(Kind):
    """`nn.Conv1d/2d/3d`: A is a convolution to r channels, B a 1x1 convolution, as in PEFT."""

    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def shape(self) -> Shape:
        """Give (out, in * kernel)."""
        out, channels, *kernel = self.weight.shape
        return Shape(out, channels * prod(kernel), bias=self.bias is not None, kernel=prod(kernel))

    def matrix(self) -> Tensor:
        """Give weight.flatten(1)."""
        return dense(self.weight).flatten(1)

    def laid_out(self, matrix: Tensor) -> Tensor:
        """Give it the kernel's shape."""
        return matrix.reshape(self.weight.shape)

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Convolve with k output channels, same stride, padding and dilation."""
        return self._conv_forward(x, matrix.reshape(-1, *self.weight.shape[1:]), None)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        """Mix the channel dimension: a 1x1 convolution."""
        spatial = self.weight.dim() - 2
        convolve = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
        return convolve(h, matrix.reshape(*matrix.shape, *[1] * spatial))

    def input_rows(self, x: Tensor) -> Tensor:
        """Cut the patches that the kernel sees: a convolution with the identity matrix."""
        one = torch.eye(self.weight[0].numel(), dtype=x.dtype, device=x.device)
        return ConvKind.output_rows(self, ConvKind.project(self, x, one))

    def output_rows(self, y: Tensor) -> Tensor:
        """Move the channels behind the spatial dimensions."""
        y = y.movedim(1 - self.weight.dim(), -1)
        return y.reshape(-1, y.shape[-1])

    def channels(self, v: Tensor) -> Tensor:
        """Give (out, 1, ...): channels stand before the spatial dimensions."""
        return v.reshape(-1, *[1] * (self.weight.dim() - 2))

    def input_channels(self, v: Tensor) -> Tensor:
        """Give (in, 1, ...): in the input too."""
        return ConvKind.channels(self, v)


@singledispatch
def kind_of(layer: nn.Module) -> type[Kind] | None:
    """Give the mixin of a layer's class; register a new kind here."""
    return None


@kind_of.register
def _(layer: nn.Linear) -> type[Kind]:
    return LinearKind


@kind_of.register
def _(layer: nn.Embedding) -> type[Kind]:
    return EmbeddingKind


@kind_of.register
def _(layer: _ConvNd) -> type[Kind] | None:
    # A transposed convolution is no `project`; a grouped one has a block matrix that B A cannot give.
    return None if layer.transposed or layer.groups > 1 else ConvKind


def kind(layer: nn.Module) -> type[Kind] | None:
    """Give the mixin of a layer, or None where the layer is not one matrix."""
    learn(type(layer))
    learn(type(layer._parameters.get("weight")))
    transformers = sys.modules.get("transformers.pytorch_utils")  # present only if the model came from there
    if transformers is not None and isinstance(layer, transformers.Conv1D):
        return Conv1DKind
    return kind_of(layer)


def require_kind(path: str, layer: nn.Module) -> type[Kind]:
    """Like `kind`, or UsageError with the reason."""
    found = kind(layer)
    if found is None:
        grouped = isinstance(layer, _ConvNd) and layer.groups > 1
        why = f"it is a convolution with groups={layer.groups}, whose matrix is block-diagonal" if grouped else None
        raise UsageError(
            f"{path}: a {type(layer).__name__} cannot carry an adapter",
            why=why or "its weight is not one matrix (Linear, Conv1D, Embedding and Conv1d/2d/3d are)",
            fix="target the layers inside it, or train it in full with modules_to_save",
        )
    return found


def is_linear(layer: nn.Module) -> bool:
    """Whether `all-linear` means this layer: Linear and Conv1D, but not the projection that MultiheadAttention reads past."""
    mixin = kind(layer)
    linear = mixin is not None and issubclass(mixin, LinearKind | Conv1DKind)
    return linear and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
