"""FourierFT: Fine-Tuning with Discrete Fourier Transform. Gao et al. 2024, https://arxiv.org/abs/2405.03003

    W' = W + s·Re(ifft2(S))     S: (out, in), zero except for n trained numbers at random entries (u_k, v_k)

The entries come from a seed (as PEFT draws them, bit for bit) and are the same for all layers of the same size; only
the n numbers are trained and saved. A two-dimensional transform is one along each dimension, so that the change of the
output needs no matrix of the size of W, with X = ifft(x) along the inputs and Y (out,) zero at first:

    Y[u_k] += c_k X[v_k]      y = W x + s·Re(ifft(Y)) + b

That is O(in log in + n + out log out) for a token, where the matrix takes a transform of out·in numbers in each step
and out·in multiplications for each token. A convolution, whose input has no such vectors, takes the matrix.

Departures from the paper: the numbers start at 0 (PEFT's `init_weights=True`) instead of standard normal, so that the
start is the base model. A layer with fewer than n entries trains all of them. Embeddings are refused: the transform
would run over the whole vocabulary.

When: an adapter is to be a few kilobytes: one number for each of n frequencies a layer, whatever its size. It costs
two transforms of each token's vectors in fp32 until it is merged, and learns less than LoRA on tasks that are far from
the base.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Base, PeftFormat, Shape
from ..core.errors import UsageError
from ..core.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class FourierFT:
    """A few trained frequencies of each layer's change. It wants a far higher learning rate than LoRA (1e-2 and more).

    n_frequency: trained numbers of a layer
    scaling: factor s; the transform divides by out·in, so it is large
    random_loc_seed: seed of the entries
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777

    PEFT: ClassVar = PeftFormat(
        "FOURIERFT",
        tensors={"fourierft_spectrum": "fourierft_spectrum"},
        fields={"n_frequency": "n_frequency", "scaling": "scaling", "random_loc_seed": "random_loc_seed"},
        ignored={"init_weights": True},
    )

    def __post_init__(self) -> None:
        if self.n_frequency < 1:
            raise UsageError(f"n_frequency must be at least 1, not {self.n_frequency}")
        if not math.isfinite(self.scaling) or self.scaling == 0:
            raise UsageError(f"scaling must be a number other than 0, not {self.scaling}")
        if not -(2**63) <= self.random_loc_seed < 2**64:
            raise UsageError(f"random_loc_seed must be a 64-bit integer, not {self.random_loc_seed}")
        object.__setattr__(self, "scaling", float(self.scaling))  # 1 and 1.0 are written alike

    def shared(self, shapes: Sequence[Shape]) -> "SharedFourierFT":
        """Give the method for several layers: those of the same size have the same entries."""
        return SharedFourierFT(self)

    def build(self, shape: Shape) -> "FourierFTAdapter":
        """Make the adapter of a single layer."""
        return self.shared([shape]).build(shape)


@final
class SharedFourierFT:
    """FourierFT with the entries drawn so far, by the size of the matrix: a draw is a permutation of the whole matrix."""

    def __init__(self, config: FourierFT) -> None:
        self.config = config
        self.drawn: dict[int, Tensor] = {}

    def build(self, shape: Shape) -> "FourierFTAdapter":
        """Make the adapter of one layer."""
        if shape.one_hot:
            raise UsageError(
                "FourierFT cannot adapt an embedding",
                why="the change of every token's vector would be a wave over the whole vocabulary",
                fix="leave it out with exclude_modules",
            )
        size = shape.out_features * shape.in_features
        entries = torch.empty(min(self.config.n_frequency, size), dtype=torch.int64)
        if not entries.is_meta:  # where a file is checked only the shapes matter
            if size not in self.drawn:
                generator = torch.Generator("cpu").manual_seed(self.config.random_loc_seed)
                self.drawn[size] = torch.randperm(size, generator=generator, device="cpu")[: len(entries)].clone()
            entries.copy_(self.drawn[size])
        return FourierFTAdapter(self.config, shape, entries)


@final
class FourierFTAdapter(AdditiveAdapter):
    """The trained numbers of one layer's spectrum."""

    ROLES: ClassVar[Mapping[str, str]] = {"fourierft_spectrum": "other"}
    entries: Tensor
    scale: Tensor

    def __init__(self, config: FourierFT, shape: Shape, entries: Tensor) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.fourierft_spectrum = nn.Parameter(torch.empty(len(entries)))
        places = entries.new_empty(2, len(entries))
        if not entries.is_meta:  # there only shapes matter, and a division would load torch's compiler (seconds)
            places = torch.stack([entries // shape.in_features, entries % shape.in_features])
        self.register_buffer("entries", places, persistent=False)
        self.register_buffer("scale", torch.tensor(config.scaling), persistent=False)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start at the base layer: no frequency."""
        nn.init.zeros_(self.fourierft_spectrum)

    def delta_weight(self) -> Tensor:
        """Give s·Re(ifft2(S))."""
        spectrum = self.fourierft_spectrum.new_zeros(self.shape.out_features, self.shape.in_features)
        spectrum = spectrum.index_put(tuple(self.entries), self.fourierft_spectrum)
        return torch.fft.ifft2(spectrum).real * self.scale

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Give the change for x, in the dtype of the parameters: there is no transform in fewer bits."""
        x = x.to(self.fourierft_spectrum.dtype)
        if not base.VECTORS:
            return base.project(x, self.delta_weight())
        u, v = self.entries
        waves = torch.fft.ifft(x).index_select(-1, v) * self.fourierft_spectrum
        sums = waves.new_zeros(*x.shape[:-1], self.shape.out_features).index_add(-1, u, waves)
        return torch.fft.ifft(sums).real * self.scale


METHOD = FourierFT
