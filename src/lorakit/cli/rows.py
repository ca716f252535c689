"""Tokenised rows for commands that look at data: a data path with a tokenizer, or what a configuration file says."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import FileError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data import Dataset

YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Source:
    """Where rows come from and how they are to be read."""

    path: str
    model: str
    task: str | None = None
    format: str | None = None
    max_length: int | None = None
    skip_bad_rows: bool = False


def source(path: str, model: str | None, task: str | None, format: str | None, max_length: int | None) -> Source:
    """Give the source that a path means: data, or the configuration file that names them. Options win over the file."""
    if Path(path).suffix not in YAML:
        return Source(path, model or default_model(path, task, format), task, format, max_length, skip_bad_rows=True)
    from ..train.config_file import load

    config, _ = load(path)
    return Source(
        config.data.path,
        model or config.model.name,
        task or config.train.task,
        format or config.data.format,
        max_length or config.train.max_length,
        config.data.skip_bad_rows,
    )


def default_model(path: str, task: str | None = None, format: str | None = None) -> str:
    """Give the built-in model that suits rows: the encoder for classification, else the chat model."""
    from ..data import find_task, read

    found = task or find_task(read(path, skip_bad_rows=True)[:100], format)
    return "minilm" if found == "classification" else "smollm2"


def open_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model and nothing else of it."""
    from transformers import AutoTokenizer

    from ..models import resolve
    from ..models.console import quiet_transformers

    path = resolve(name)
    try:
        with quiet_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            return tokenizer
    except (OSError, ValueError) as error:
        raise FileError("cannot load the tokenizer", why=str(error).splitlines()[0], where=str(path)) from None


def tokenised(where: Source) -> tuple["Dataset", "PreTrainedTokenizerBase"]:
    """Read and tokenise the rows. Raises DataError for rows that cannot be used."""
    from ..data import encode, read

    tokenizer = open_tokenizer(where.model)
    if where.task is not None and where.task not in ("sft", "completion", "classification"):
        raise UsageError(f"unknown task {where.task!r}", fix="one of sft, completion, classification")
    dataset = encode(
        read(where.path, skip_bad_rows=where.skip_bad_rows),
        tokenizer,
        task=where.task,
        format=where.format,
        max_length=where.max_length,
        skip_bad_rows=where.skip_bad_rows,
    )
    return dataset, tokenizer
