"""The base model of a run: loaded for the task, quantized if the configuration says so."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.statistics import Statistics
from ..core.target import Target
from ..data.rows import Rows
from ..models.load import load as load_model
from ..models.quantize import quantize
from .config import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Base:
    """A model and its tokenizer.

    head: modules that start untrained and must be trained in full. lost: what quantization took from the layers, if the
    adapters start from that.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    head: list[str]
    path: Path | None
    lost: dict[str, Statistics]


def load_base(config: RunConfig, task: str, rows: Rows, device: str = "auto") -> Base:
    """Load the model that `config.model` names for the task of these rows. Raises FileError and UsageError."""
    kind = "classification" if task == "classification" else "causal"
    labels = _class_names(config, rows) if kind == "classification" else None
    lost: dict[str, Statistics] = {}

    def shrink(model: "PreTrainedModel", head: list[str]) -> None:
        target = vars(with_head(config.method.target, head))
        lost.update(quantize(model, str(config.model.quantize), config.method.config, **target))

    loaded = load_model(
        config.model.name,
        task=kind,
        dtype=config.model.dtype,
        labels=labels,
        seed=config.train.seed,
        device=device,
        prepare=shrink if config.model.quantize else None,
    )
    return Base(loaded.model, loaded.tokenizer, loaded.head_modules, loaded.path, lost)


def with_head(target: Target, head: list[str]) -> Target:
    """Give `target` with the modules of an untrained head among those that are trained in full."""
    return replace(target, modules_to_save=list(dict.fromkeys([*(target.modules_to_save or ()), *head])) or None)


def _class_names(config: RunConfig, rows: Rows) -> list[str]:
    from ..data.classify import class_names
    from ..data.formats import Labelled, find_format, parse_rows, rename_columns

    table, form = rename_columns(rows, config.data.format)
    records, _ = parse_rows(table, find_format(table, form))
    return class_names([record.label for record, _ in records if isinstance(record, Labelled)])
