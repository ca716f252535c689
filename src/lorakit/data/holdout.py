"""Training and validation rows: two sources, two splits of one, or a part held out."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import DataError, UsageError
from .rows import Row, Rows
from .sources import read, splits


def read_train_valid(
    path: str | Path, valid: str | float | Path | None = None, *, skip_bad_rows: bool = False, seed: int = 0
) -> tuple[Rows, Rows | None]:
    """Read the training rows and the validation rows, if any.

    valid: a source of its own; the fraction of the training rows to hold out; or None for the valid split of `path`,
    where it has one. Raises DataError, UsageError.
    """
    train = read(path, "train", skip_bad_rows=skip_bad_rows)
    if isinstance(valid, float | int):
        return hold_out(train, valid, seed)
    if valid is not None:
        split = "valid" if "valid" in splits(valid) else "train"
        return train, read(valid, split, skip_bad_rows=skip_bad_rows)
    return train, read(path, "valid", skip_bad_rows=skip_bad_rows) if "valid" in splits(path) else None


def hold_out(rows: Rows | Sequence[Row], fraction: float, seed: int = 0) -> tuple[Rows, Rows]:
    """Split rows into training and validation by the hash of their content and the seed, each in file order.

    Equal rows stay on one side, so none is in both; apart from them the validation part is `fraction` of the rows, at
    least one. The order of the rows plays no part.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"data.valid: {fraction} is no fraction", fix="give a number between 0 and 1, or a path")
    keys = [_draw(row, seed) for row in rows]
    wanted = max(1, round(len(rows) * fraction))
    last = sorted(keys)[wanted - 1]
    notices, bad = (rows.notices, rows.bad) if isinstance(rows, Rows) else ([], [])
    train = Rows((row for row, key in zip(rows, keys, strict=True) if key > last), bad, notices)
    valid = Rows(row for row, key in zip(rows, keys, strict=True) if key <= last)
    if not train:
        fix = "give more rows, or a validation file: data.valid: PATH"
        raise DataError(f"holding out {fraction} of {len(rows)} rows leaves none to train on", fix=fix)
    return train, valid


def _draw(row: Row, seed: int) -> bytes:
    content = json.dumps(row.fields, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(f"{seed}\n{content}".encode()).digest()
