"""Where rows come from: a file, a directory of splits, or a hub data set `hf:name`; `#N` behind it takes N rows.

A directory holds `train.jsonl`, `valid.jsonl` (or validation, val, dev) and `test.jsonl`, in any format read here, in
one file, in shards (`train-00000-of-00004.parquet`) or in a sub-directory of that name. Nothing in it is executed.
"""

import difflib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..core.errors import DataError, UsageError
from .columns import hub_rows, hub_splits, parse_columns
from .csv_rows import parse_csv, parse_tsv
from .json_rows import parse_json, parse_jsonl
from .rows import BadRow, Row, Rows, refuse

Parser = Callable[[Path, list[BadRow], list[str]], Iterator[Row]]

TEXT_PARSERS: dict[str, Parser] = {
    ".jsonl": parse_jsonl,
    ".ndjson": parse_jsonl,
    ".json": parse_json,
    ".csv": parse_csv,
    ".tsv": parse_tsv,
}
PARSERS: dict[str, Parser] = {
    **TEXT_PARSERS,
    **{f"{suffix}.gz": parser for suffix, parser in TEXT_PARSERS.items()},
    ".parquet": parse_columns,
    ".arrow": parse_columns,
}
SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test",),
}


def read(path: str | Path, split: str = "train", *, skip_bad_rows: bool = False) -> Rows:
    """Read the rows of a source; a file has one split, so `split` chooses only in a directory or a hub data set.

    `path#N` takes N rows spread over the source by a fixed random draw (`random.Random(0)`), in their order. Raises
    DataError if the source is missing or has a bad row; with `skip_bad_rows` bad rows are left out and listed in `bad`.
    """
    source, wanted = _take_suffix(str(path))
    bad: list[BadRow] = []
    notices: list[str] = []
    if source.startswith("hf:"):
        rows = list(hub_rows(source[3:], _hub_split(source[3:], split)))
    else:
        rows = [row for file in _files(Path(source), split) for row in _parser(file)(file, bad, notices)]
    total = len(rows) + len(bad)
    if bad and not skip_bad_rows:
        raise refuse(bad, total)
    if not rows:
        raise DataError(f"{path}: 0 usable rows", why=f"all {total} rows are bad" if total else "it is empty")
    if wanted is not None and wanted < len(rows):
        notices.append(f"{source}: {wanted} of {len(rows)} rows, drawn with a fixed seed")
        rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), wanted))]
    return Rows(rows, bad, notices)


def splits(path: str | Path) -> set[str]:
    """Name the splits (train, valid, test) of a source; a single file counts as train."""
    source, _ = _take_suffix(str(path))
    if source.startswith("hf:"):
        there = set(hub_splits(source[3:]))
        return {split for split, names in SPLIT_NAMES.items() if there & set(names)}
    if not Path(source).is_dir():
        return {"train"}
    return {split for split in SPLIT_NAMES if _of_split(Path(source), split)}


def _take_suffix(path: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.+)#(\d+)", path)
    if not found or Path(path).exists():
        return path, None
    if int(found[2]) == 0:
        raise UsageError(f"data: {path!r} takes 0 rows", fix="give a number of 1 or more behind '#'")
    return found[1], int(found[2])


def _files(path: Path, split: str) -> list[Path]:
    if split not in SPLIT_NAMES:
        raise UsageError(f"unknown split {split!r}", fix=f"one of {', '.join(SPLIT_NAMES)}")
    if not path.exists():
        raise DataError(f"data: {str(path)!r} does not exist", fix=_near(path))
    if not path.is_dir():
        return [path]
    files = _of_split(path, split)
    readable = [file for file in sorted(path.iterdir()) if _suffix(file) in PARSERS]
    if not files and split == "train" and len(readable) == 1:
        return readable
    if not files:
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        names = " or ".join(f"{name}.jsonl" for name in SPLIT_NAMES[split][:2])
        raise DataError(f"{path} has no {split} split", why=f"it holds {there}", fix=f"name the file {names}")
    return files


def _of_split(directory: Path, split: str) -> list[Path]:
    """Give the files of one split: `train.jsonl`, its shards, or those of the sub-directory `train/`."""
    name = re.compile(rf"(?:{'|'.join(SPLIT_NAMES[split])})(?:[-_.]\d.*)?", re.IGNORECASE)
    files: list[Path] = []
    for entry in sorted(directory.iterdir()):
        stem = entry.name.removesuffix(_suffix(entry))
        if name.fullmatch(stem) and entry.is_dir():
            files += [file for file in sorted(entry.iterdir()) if _suffix(file) in PARSERS]
        elif name.fullmatch(stem) and _suffix(entry) in PARSERS:
            files.append(entry)
    return files


def _suffix(path: Path) -> str:
    return "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower()


def _parser(file: Path) -> Parser:
    if _suffix(file) not in PARSERS:
        raise DataError(f"{file}: data is not read from {_suffix(file) or 'a file without suffix'}", fix=_readable())
    return PARSERS[_suffix(file)]


def _readable() -> str:
    return f"give one of {' '.join(TEXT_PARSERS)} (also .gz), .parquet, .arrow, a directory of them, or hf:NAME"


def _near(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    hub = f"; a hub data set is written hf:{path}" if path.parent != Path() and not path.parent.exists() else ""
    return f"did you mean {str(path.parent / near[0])!r}?" if near else f"check the path{hub}"


def _hub_split(name: str, split: str) -> str:
    there = hub_splits(name)
    for candidate in SPLIT_NAMES[split]:
        if candidate in there:
            return candidate
    raise DataError(
        f"hf:{name} has no {split} split", why=f"it has {', '.join(there)}", fix="give a path for this split"
    )
