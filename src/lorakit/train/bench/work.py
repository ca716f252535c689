"""The work of a benchmark: random rows, which of their tokens are trained, and start values, the same for every arm."""

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Work:
    """Optimizer steps of one arm on the same `batch` rows of `length` random tokens.

    model: directory or built-in name; dtype: number format of the frozen weights
    labels: train all tokens, or the second half of each row, as if the first were a prompt
    method: lora or dora, of rank `rank`, on all linear layers
    device: cpu or cuda, for every arm
    compile, cuda_graph: how lorakit's arm runs (`train.compile`, `train.cuda_graph`)
    steps: steps that are timed, after one that warms up and is compared
    gradients: file for the gradients of that first step
    limit: whether to measure the machine's matrix multiplication as well
    """

    model: str
    dtype: Literal["float32", "bfloat16"]
    batch: int = 4
    length: int = 256
    labels: Literal["all", "half"] = "all"
    method: Literal["lora", "dora"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    device: Literal["cpu", "cuda"] = "cpu"
    compile: bool = False
    cuda_graph: bool = False
    steps: int = 3
    threads: int = 1
    seed: int = 0
    gradients: str | None = None
    limit: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    def rows(self, vocabulary: int) -> list[list[int]]:
        """Give the token ids, (batch, length)."""
        draw = random.Random(self.seed)
        return [[draw.randrange(vocabulary) for _ in range(self.length)] for _ in range(self.batch)]

    def trained(self) -> list[bool]:
        """Say of each position of a row whether it is trained; nothing predicts the first."""
        first = 1 if self.labels == "all" else max(1, self.length // 2)
        return [position >= first for position in range(self.length)]

    def labelled(self, rows: list[list[int]]) -> list[list[int]]:
        """Give the labels of rows, not shifted: the id itself where it is trained, else -100."""
        mask = self.trained()
        return [[token if on else IGNORED for token, on in zip(row, mask, strict=True)] for row in rows]


@torch.no_grad()
def set_start(factors: Mapping[str, nn.Parameter]) -> None:
    """Give both factors of every layer values that depend on its name alone.

    A is (r, in) with variance 1/in, B (out, r) has deviation 0.01. B is not zero: with a zero B the loss would be the
    base's whatever the adapter does, and A would have no gradient.
    """
    for name, parameter in factors.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        deviation = parameter.shape[1] ** -0.5 if name.endswith("lora_A") else 0.01
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)


def gradients(factors: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copy the gradients of the factors, in float32."""
    return {name: p.grad.float().clone() for name, p in factors.items() if p.grad is not None}
