"""Data: rows from files, their format found by looking, tokens with a mask of what is trained, batches in a pure order.

`read` or `read_train_valid` give rows, `encode` makes a Dataset of them, `epoch_plan` and a `collate_*` make batches.
"""

from .chat import ChatTemplate
from .collate import collate_classification, collate_packed, collate_padded
from .dataset import Dataset, Example, Examples, Facts, Stats, overlap
from .encode import encode, find_task
from .formats import find_format, parse_rows
from .holdout import hold_out, read_train_valid
from .order import epoch_plan, steps_per_epoch, windows
from .plain import plain_prompt_ids, write_prompt
from .preview import preview, segments, to_plain, to_rich
from .rows import BadRow, Row, Rows
from .sources import read, splits

__all__ = [
    "BadRow",
    "ChatTemplate",
    "Dataset",
    "Example",
    "Examples",
    "Facts",
    "Row",
    "Rows",
    "Stats",
    "collate_classification",
    "collate_packed",
    "collate_padded",
    "encode",
    "epoch_plan",
    "find_format",
    "find_task",
    "hold_out",
    "overlap",
    "parse_rows",
    "plain_prompt_ids",
    "preview",
    "read",
    "read_train_valid",
    "segments",
    "splits",
    "steps_per_epoch",
    "to_plain",
    "to_rich",
    "windows",
    "write_prompt",
]
