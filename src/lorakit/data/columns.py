"""Rows of Parquet and Arrow files and of hub data sets, through the optional packages `pyarrow` and `datasets`.

Local files are read with pyarrow, since `datasets.load_dataset` asks the network even for a local file.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UsageError
from .rows import BadRow, Row
from .textfile import check_regular


def parse_columns(path: Path, bad: list[BadRow], notices: list[str]) -> Iterator[Row]:
    """Give the rows of a .parquet or .arrow file (stream or file form), batch by batch."""
    kind = path.suffix.removeprefix(".").lower()
    pyarrow = _package("pyarrow", str(path))
    check_regular(path)
    try:
        if kind == "parquet":
            table = _package("pyarrow.parquet", str(path)).ParquetFile(path)
            schema, batches = table.schema_arrow, table.iter_batches()
        else:
            table = _open_arrow(pyarrow, path)
            schema, batches = table.schema, iter(table)
        values = (row for batch in batches for row in batch.to_pylist())
        yield from _rows(values, _class_names(schema.metadata or {}), str(path))
    except Exception as error:  # a file from anywhere: its metadata can be anything, too
        raise DataError(
            f"{path} cannot be read as {kind}", why=_first_line(error), fix="write the file again"
        ) from None


def hub_splits(name: str) -> list[str]:
    """Name the splits of a hub data set `owner/name` or `owner/name:config`."""
    return _hub(name, lambda datasets, *at: datasets.get_dataset_split_names(*at))


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Give the rows of one split of a hub data set; it is fetched once into the cache of `datasets`."""
    table = _hub(name, lambda datasets, *at: datasets.load_dataset(*at, split=split))
    class_label = _package("datasets", name).ClassLabel
    names = {column: feature.names for column, feature in table.features.items() if isinstance(feature, class_label)}
    yield from _rows(table, names, f"hf:{name}[{split}]")


def _hub(name: str, ask: Callable[..., Any]) -> Any:
    datasets = _package("datasets", f"hf:{name}")
    repository, _, config = name.partition(":")
    try:
        return ask(datasets, repository, *([config] if config else []))
    except Exception as error:  # network, names and file formats all fail in their own ways
        fix = "check the name (owner/name or owner/name:config) and the network; HF_HUB_OFFLINE=1 uses the cache only"
        raise DataError(f"hf:{name} cannot be read", why=_first_line(error), fix=fix) from None


def _open_arrow(pyarrow: Any, path: Path) -> Any:
    try:
        reader = pyarrow.ipc.open_file(pyarrow.OSFile(str(path)))
        return pyarrow.RecordBatchReader.from_batches(
            reader.schema, map(reader.get_batch, range(reader.num_record_batches))
        )
    except pyarrow.ArrowInvalid:  # what `datasets` writes is the other form
        return pyarrow.ipc.open_stream(pyarrow.OSFile(str(path)))


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Give the class names that `datasets` writes into a file, by column."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return {column: feature["names"] for column, feature in features.items() if feature.get("_type") == "ClassLabel"}


def _rows(table: Iterable[dict[str, Any]], names: dict[str, list[str]], source: str) -> Iterator[Row]:
    """Give rows with class numbers replaced by their names and nulls left out, as a JSONL file would have them."""
    for number, values in enumerate(table, 1):
        fields = {column: value for column, value in values.items() if value is not None}
        for column in names.keys() & fields.keys():
            if 0 <= fields[column] < len(names[column]):
                fields[column] = names[column][fields[column]]
        yield Row(fields, f"{source}:{number}")


def _package(name: str, source: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        why = f"Parquet, Arrow and hub data sets need the package {name!r}, which is not installed"
        raise UsageError(f"data: {source!r} cannot be read", why=why, fix="pip install 'lorakit[data]'") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
