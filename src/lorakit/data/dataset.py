"""Tokenised rows: Example, the flat store they come from, and what is known of a whole data set."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, overload

from .rows import BadRow

IGNORED = -100  # label of a token that is not trained: what torch's cross entropy ignores


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row.

    labels: as long as input_ids, not shifted: the id itself where the token is trained, else -100; [] for a classifier
    label: class index for classification
    where: "train.jsonl:17"
    token_type_ids: 0 for the first text and 1 for the second, for encoders that tell a pair apart
    """

    input_ids: list[int]
    labels: list[int]
    label: int | None
    where: str
    token_type_ids: list[int] | None = None


class Examples(Sequence[Example]):
    """Rows in flat arrays, about 5 bytes a token, handed out as Example."""

    def __init__(self) -> None:
        self._ids, self._trained, self._types = array("i"), bytearray(), bytearray()
        self._ends, self._classes, self._where = array("q", [0]), array("i"), list[str]()

    def add(self, ids: Sequence[int], trained: Sequence[bool], where: str) -> None:
        """Append a row for a language model; the first token is never trained, since nothing predicts it."""
        self._append(ids, where, label=-1)
        self._trained.extend(trained)
        if ids:
            self._trained[-len(ids)] = False

    def add_labelled(self, ids: Sequence[int], types: Sequence[int] | None, label: int, where: str) -> None:
        """Append a row for a classifier."""
        self._append(ids, where, label)
        self._types.extend(types or [])

    def _append(self, ids: Sequence[int], where: str, label: int) -> None:
        self._ids.extend(ids)
        self._ends.append(len(self._ids))
        self._classes.append(label)
        self._where.append(where)

    def _bounds(self) -> Iterator[tuple[int, int]]:
        return pairwise(self._ends)

    def __len__(self) -> int:
        return len(self._where)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        span = slice(self._ends[index], self._ends[index + 1])
        ids = self._ids[span].tolist()
        trained = self._trained[span]
        labels = [token if on else IGNORED for token, on in zip(ids, trained, strict=True)] if trained else []
        label = self._classes[index]
        types = list(self._types[span]) if self._types else None
        return Example(ids, labels, None if label < 0 else label, self._where[index], types)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [end - begin for begin, end in self._bounds()]

    @property
    def trained(self) -> list[int]:
        """Trained tokens of each row of a language model."""
        return [self._trained.count(1, begin, end) for begin, end in self._bounds()]

    def last_trained(self) -> Iterator[int | None]:
        """Give the id of the last trained token of each row."""
        for begin, end in self._bounds():
            at = self._trained.rfind(1, begin, end)
            yield None if at < 0 else self._ids[at]

    def largest_id(self) -> int:
        """Give the largest token id."""
        return max(self._ids, default=0)

    def digests(self) -> Iterator[bytes]:
        """Give 16 bytes a row that are equal only for rows of equal tokens, mask and class."""
        for index, (begin, end) in enumerate(self._bounds()):
            content = hashlib.blake2b(self._ids[begin:end].tobytes(), digest_size=16)
            content.update(self._trained[begin:end] + self._classes[index : index + 1].tobytes())
            yield content.digest()

    def fingerprint(self) -> str:
        """Give the sha256 of the tokenised content, in row order; where a row came from plays no part."""
        content = hashlib.sha256()
        for part in (self._ends, self._ids, self._trained, self._classes, self._types):
            content.update(len(part).to_bytes(8, "little"))
            content.update(part)
        return content.hexdigest()


@dataclass(frozen=True)
class Facts:
    """What was checked before training.

    every_row_trained: each row has at least one trained token
    ends_with_end_token: the last trained token of each row that was not cut is an end token
    end_token: that token, as text
    template: first 12 digits of the sha256 of the chat template
    bos_token: the token put in front of each row, if the tokenizer does so
    largest_id: largest token id, which must be below the rows of the model's embedding
    """

    every_row_trained: bool
    ends_with_end_token: bool | None
    end_token: str | None
    template: str | None
    bos_token: str | None
    largest_id: int


@dataclass
class Stats:
    """Counts of one encoding; lengths are in tokens, before anything was cut.

    rows: rows of the source, bad ones included; kept: examples that came out (a split document gives several)
    truncated: rows cut at max_length; split: documents cut into pieces, with nothing lost; dropped: rows not used
    control_rows: rows with text that looks like a control token, tokenised as ordinary text
    duplicates: examples equal to an earlier one
    """

    rows: int
    kept: int
    truncated: int
    split: int
    dropped: int
    tokens: int
    trained_tokens: int
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    max_length: int
    control_rows: int
    duplicates: int
    bad_rows: list[BadRow] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Dataset:
    """A tokenised data set.

    examples: the rows; format: how they were understood, in words; task: sft, completion or classification
    labels: class names by index, for classification
    prompt_format: how a prompt is written without a chat template, with the place {prompt}; None with one
    fingerprint: sha256 of the tokenised content
    """

    examples: Examples
    stats: Stats
    facts: Facts
    task: str
    format: str
    labels: list[str] | None
    prompt_format: str | None
    fingerprint: str

    @property
    def max_length(self) -> int:
        """Longest row allowed, in tokens."""
        return self.stats.max_length

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self.examples.lengths

    def __len__(self) -> int:
        return len(self.examples)


def percentile(sorted_values: Sequence[int], share: float) -> int:
    """Give the smallest value that at least `share` of the values do not exceed."""
    if not sorted_values:
        return 0
    return sorted_values[max(0, -int(-share * len(sorted_values) // 1) - 1)]


def overlap(train: Dataset, valid: Dataset) -> int:
    """Count the validation examples that are also in the training data."""
    seen = set(train.examples.digests())
    return sum(digest in seen for digest in valid.examples.digests())
