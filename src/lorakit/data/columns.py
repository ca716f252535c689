"""Rows of Parquet and Arrow files and of hub data sets, through the optional package `datasets`."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UsageError
from .rows import BadRow, Row


def parse_columns(path: Path, bad: list[BadRow], notices: list[str]) -> Iterator[Row]:
    """Give the rows of a .parquet or .arrow file."""
    datasets = _datasets(str(path))
    kind = path.suffix.removeprefix(".").lower()
    try:
        table = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        yield from _rows(table, str(path))
    except Exception as error:  # the package raises whatever its readers raise
        raise DataError(f"{path} cannot be read as {kind}", why=_first_line(error)) from None


def hub_splits(name: str) -> list[str]:
    """Name the splits of a hub data set `owner/name` or `owner/name:config`."""
    return _hub(name, lambda datasets, *at: datasets.get_dataset_split_names(*at))


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Give the rows of one split of a hub data set; it is fetched once into the cache of `datasets`."""
    table = _hub(name, lambda datasets, *at: datasets.load_dataset(*at, split=split))
    yield from _rows(table, f"hf:{name}[{split}]")


def _hub(name: str, ask: Any) -> Any:
    datasets = _datasets(f"hf:{name}")
    repository, _, config = name.partition(":")
    try:
        return ask(datasets, repository, *([config] if config else []))
    except Exception as error:  # network, names and file formats all fail in their own ways
        fix = "check the name (owner/name or owner/name:config) and the network; HF_HUB_OFFLINE=1 uses the cache only"
        raise DataError(f"hf:{name} cannot be read", why=_first_line(error), fix=fix) from None


def _rows(table: Any, source: str) -> Iterator[Row]:
    """Give rows with class numbers replaced by their names and nulls left out, as a JSONL file would have them."""
    names = {column: feature.names for column, feature in (table.features or {}).items() if hasattr(feature, "int2str")}
    for number, values in enumerate(table, 1):
        fields = {column: value for column, value in values.items() if value is not None}
        for column in names.keys() & fields.keys():
            if 0 <= fields[column] < len(names[column]):
                fields[column] = names[column][fields[column]]
        yield Row(fields, f"{source}:{number}")


def _datasets(source: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        why = "Parquet, Arrow and hub data sets are read through the package 'datasets', which is not installed"
        raise UsageError(f"data: {source!r} cannot be read", why=why, fix="pip install 'lorakit[data]'") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
