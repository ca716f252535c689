"""A model without its weights: every module with its shapes, on the meta device, where tensors take no memory."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .console import quiet_transformers
from .directory import tensors
from .load import Task, auto_class, pick_device, pick_dtype, read_config, set_labels

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def skeleton(
    path: Path,
    *,
    task: Task = "causal",
    dtype: str | torch.dtype = "auto",
    labels: list[str] | None = None,
    device: str | torch.device = "auto",
) -> "PreTrainedModel":
    """The model `load` would give for a resolved `path`, with shapes and dtypes only. Adapters can be attached to it.

    `device` is where training would run; it decides only what dtype "auto" is. Raises as `load` does for config.json.
    """
    config = read_config(path)
    if task == "classification":
        set_labels(config, labels, path)
    return _empty(config, task, pick_dtype(dtype, pick_device(device), task, config))


def twin(model: "PreTrainedModel", *, task: Task = "causal") -> "PreTrainedModel":
    """The skeleton of a loaded model as it was loaded: without its adapters, its weights not quantized."""
    return _empty(deepcopy(model.config), task, model.dtype)


def _empty(config: "PretrainedConfig", task: Task, dtype: torch.dtype) -> "PreTrainedModel":
    with quiet_transformers(), torch.device("meta"):
        return auto_class(config, task).from_config(config, dtype=dtype, trust_remote_code=False)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Matrices of the same name and shape (out, in), one per layer."""

    name: str
    shape: tuple[int, ...]
    count: int

    @property
    def parameters(self) -> int:
        """All of them together."""
        return self.count * torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Where the parameters of a model are. A tied weight counts once, as an embedding."""

    layers: int
    embedding: int
    matrices: list[Matrix]
    other: int
    """Norms and biases."""
    stored_bytes: int
    """Size of the weights on disk."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + sum(matrix.parameters for matrix in self.matrices) + self.other


def anatomy(model: "PreTrainedModel", path: Path) -> Anatomy:
    """Count the parameters of a skeleton (or a model) without adapters, and what its files in `path` hold."""
    embedding = other = 0
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, weight in model.named_parameters():
        if id(weight) in tables:
            embedding += weight.numel()
        elif weight.ndim < 2:
            other += weight.numel()
        else:
            leaf = name.removesuffix(".weight").rpartition(".")[2]
            counts[leaf, tuple(weight.shape)] = counts.get((leaf, tuple(weight.shape)), 0) + 1
    matrices = [Matrix(leaf, shape, count) for (leaf, shape), count in counts.items()]
    stored = sum(tensor.stop - tensor.start for tensor in tensors(path).values())
    return Anatomy(model.config.get_text_config().num_hidden_layers, embedding, matrices, other, stored)
