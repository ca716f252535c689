"""A training run from configuration to adapter: here what comes before anything is attached; then `session.py`, `loop.py`."""

import traceback
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.files import RunLock
from ..data.dataset import Dataset
from ..data.encode import encode, find_task
from ..data.holdout import read_train_valid
from ..data.rows import Rows
from .base import Base, load_base
from .config import RunConfig
from .progress import Progress
from .run_directory import RunDirectory
from .session import RunResult, Session
from .stop import listen

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(
    config: RunConfig,
    *,
    overwrite: bool = False,
    model: "tuple[PreTrainedModel, PreTrainedTokenizerBase] | None" = None,
    progress: Progress | None = None,
) -> RunResult:
    """Train as `config` says, or go on with an unfinished run of the same configuration in `config.output`.

    model: a loaded model and its tokenizer in place of the one `config.model` names. Raises UsageError, DataError and
    FileError before training, DivergenceError and Interrupted (the run is then saved) during it.
    """
    directory = RunDirectory(config.output, overwrite=overwrite)
    train, valid = read_rows(config)
    directory.make()
    with RunLock(directory.path), listen() as stop, logged(directory):
        if overwrite:
            directory.clear()
        task = config.train.task or find_task(train, config.data.format)
        base = load_base(config, task, train) if model is None else Base(*model, [], None, {})
        data, held_out = encoded(config, task, base, train, valid)
        config = resolved(config, task, data)
        directory.claim(config)
        with Session(config, directory, base, data, held_out, stop, progress) as session:
            return session.run()


def read_rows(config: RunConfig) -> tuple[Rows, Rows | None]:
    """Read the rows to train on and those to validate on, if any."""
    data = config.data
    return read_train_valid(data.path, data.valid, skip_bad_rows=data.skip_bad_rows, seed=config.train.seed)


def resolved(config: RunConfig, task: str, data: Dataset) -> RunConfig:
    """Give the configuration with what was found by looking at the data."""
    return replace(config, train=replace(config.train, task=task, max_length=data.max_length))


@contextmanager
def logged(directory: RunDirectory) -> Generator[None]:
    """Keep what went wrong in log.txt, with the traceback that the terminal does not show."""
    try:
        yield
    except BaseException:
        directory.note(traceback.format_exc())
        raise


def encoded(
    config: RunConfig, task: str, base: Base, train: Rows, valid: Rows | None
) -> tuple[Dataset, Dataset | None]:
    """Give the rows as tokens."""
    settings: dict[str, Any] = {"task": task, "format": config.data.format, "skip_bad_rows": config.data.skip_bad_rows}
    settings["model_limit"] = base.model.config.get_text_config().to_dict().get("max_position_embeddings")
    if task == "classification":
        names: Any = base.model.config.id2label
        settings["labels"] = [names[i] for i in sorted(names)]
    data = encode(train, base.tokenizer, max_length=config.train.max_length, **settings)
    if valid is None:
        return data, None
    return data, encode(valid, base.tokenizer, max_length=data.max_length, **settings)
