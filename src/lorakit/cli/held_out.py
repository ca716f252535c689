"""Held-out rows for commands that measure a model on them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..analysis.rowwise import Rows
    from ..data import Dataset
    from .opened import Opened

SPLITS = ("valid", "test", "train")


def held_out(opened: "Opened", data: str, format: str | None, limit: int) -> "tuple[Rows, Dataset]":
    """Read, tokenise and thin out the rows of a path: its validation rows, if it is a directory that has such."""
    from ..analysis.rowwise import Rows
    from ..data import encode, read, splits

    split = next(name for name in SPLITS if name in splits(data))
    dataset = encode(
        read(data, split),
        opened.tokenizer,
        task=opened.side.get("task"),
        format=format,
        labels=opened.side.get("labels"),
        max_length=opened.side.get("max_length"),
        model_limit=opened.model.config.get_text_config().to_dict().get("max_position_embeddings"),
    )
    pad = opened.tokenizer.pad_token_id
    chosen = spread(dataset.examples, limit)
    return Rows(opened.model, chosen, pad if pad is not None else 0, dataset.labels is not None), dataset


def spread(rows: Any, limit: int) -> list[Any]:
    """Give at most `limit` rows, evenly spaced; all for 0."""
    if not limit or len(rows) <= limit:
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]
