r"""Rendered text to token ids and a mask of the trained ones, so that training sees what generation will see.

The law: for every trained answer, the ids in front of it are those of the prompt tokenised by itself, since that is
what the model is given at generation. Tokenising the whole text at once can break it: by GPT-2's rules "\n\n" is one
token at the end of a prompt and two in front of a word. So a text is cut where training begins and ends, if it must be.
(Answers before that one in the same row are then cut as well, which the prompt by itself would not be: those rows are
counted.)

A special token is a hard split in every tokenizer: the text on its two sides is tokenised independently. So only the
piece from the last special token in front of a cut is looked at; all pieces of many rows are tokenised in one batch.

Text that looks like a control token but came from the data stands between the marks START and END and is tokenised as
ordinary text.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ..core.errors import DataError
from .rows import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = "\U000f0000", "\U000f0001"  # private use characters, refused in the data

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as one text, and the [start, end) ranges of its characters that are trained, in order and apart."""

    text: str
    spans: Sequence[Span]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, which of them are trained, and whether tokenising the text at once gives the same ids."""

    ids: list[int]
    trained: list[bool]
    whole: bool = True


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    edges: tuple[int, ...]  # where training begins or ends inside the text
    trained: tuple[bool, ...]  # of the text before, between and behind the edges


class Codec:
    """A tokenizer with its control tokens known: encodes rendered rows. Raises DataError."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", more_control: Collection[str] = ()) -> None:
        self.tokenizer = tokenizer
        self._added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        self.special = {text for text, token in self._added.items() if token.special}
        self.control = self.special | (set(more_control) & self._added.keys())
        self.special_ids = self._ids_of(self.special)
        self._control_ids = self._ids_of(self.control)
        self.control_pattern = any_of(self.control)
        self._special = re.compile(f"{START}[^{END}]*{END}|({any_of(self.special).pattern})")
        self._marked = re.compile(f"{START}({self.control_pattern.pattern}){END}")
        self._marked_extra = re.compile(f"{START}({any_of(self.control - self.special).pattern}){END}")
        self._newline = self.encode(["\n"])[0]
        self._spaces_text = self.encode(["a"]) != [self.encode(["\na"])[0][len(self._newline) :]]
        alone, *after = self.encode(["a", *(token + "a" for token in self.special)])
        self._spaces_after_special = all(ids[1:] == alone for ids in after)
        self._spelled: dict[str, list[int]] = {}
        self.bos_id = self._find_bos()
        self.eos_id: int | None = tokenizer.eos_token_id

    def encode(self, texts: Sequence[str], *, as_text: bool = False) -> list[list[int]]:
        """Tokenise texts as they stand, nothing added; `as_text` takes special tokens in them for ordinary text."""
        if not texts:
            return []
        tokens = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=as_text,
            verbose=False,
        )
        return tokens["input_ids"]

    def encode_rows(self, rows: Sequence[Rendered]) -> list[Encoded]:
        """Tokenise rendered rows, with the tokenizer's BOS in front where it writes one and the text does not."""
        plans = [self._pieces(row) for row in rows]
        texts = {text for pieces in plans for piece in pieces for text in (piece.text, *_prefixes(piece))}
        ids = self._tokenise(texts)
        return [self._join(pieces, ids) for pieces in plans]

    def special_spans(self, text: str) -> list[Span]:
        """Give where the special tokens of a rendered text stand, marked ones left out."""
        return [match.span(1) for match in self._special.finditer(text) if match[1] is not None]

    def unmark(self, text: str) -> str:
        """Give a rendered text without the marks around what looks like a control token."""
        return self._marked.sub(r"\1", text)

    def _ids_of(self, tokens: Iterable[str]) -> frozenset[int]:
        """Give the ids of control tokens; the one for unknown text is harmless and left out."""
        ids = {i for i in map(self.tokenizer.convert_tokens_to_ids, tokens) if isinstance(i, int)}
        return frozenset(ids - {self.tokenizer.unk_token_id})

    def _pieces(self, row: Rendered) -> list[_Piece]:
        """Cut a row in front of the last special token that ends at or before each edge of a trained span."""
        specials = self.special_spans(row.text)
        edges = sorted({edge for span in row.spans for edge in span if edge > 0})
        begins = [max((start for start, end in specials if end <= edge), default=0) for edge in edges]
        cuts = sorted({0, *begins})
        pieces = []
        for begin, end in zip(cuts, [*cuts[1:], len(row.text)], strict=True):
            inner = [edge for edge, its_begin in zip(edges, begins, strict=True) if its_begin == begin and edge < end]
            trained = [any(start <= at < stop for start, stop in row.spans) for at in (begin, *inner)]
            pieces.append(_Piece(row.text[begin:end], tuple(edge - begin for edge in inner), tuple(trained)))
        return pieces

    def _join(self, pieces: Iterable[_Piece], ids: dict[str, list[int]]) -> Encoded:
        tokens: list[int] = []
        trained: list[bool] = []
        whole = True
        for piece in pieces:
            prefixes = [ids[prefix] for prefix in _prefixes(piece)]
            parts = _split(ids[piece.text], prefixes)
            if parts is None:  # an edge falls inside a token: tokenise as generation does, prompt first, then the rest
                whole = False
                rest = zip(piece.edges, [*piece.edges[1:], len(piece.text)], strict=True)
                parts = [prefixes[0], *(self._assemble(piece.text[begin:end], inside=True) for begin, end in rest)]
            for part, is_trained in zip(parts, piece.trained, strict=True):
                tokens += part
                trained += [is_trained] * len(part)
        if self.bos_id is not None and tokens[:1] != [self.bos_id]:
            tokens, trained = [self.bos_id, *tokens], [False, *trained]
        return Encoded(tokens, trained, whole)

    def _tokenise(self, texts: Collection[str]) -> dict[str, list[int]]:
        plain = [text for text in texts if START not in text]
        ids = dict(zip(plain, self.encode(plain), strict=True))
        return ids | {text: self._assemble(text) for text in texts if START in text}

    def _assemble(self, text: str, inside: bool = False) -> list[int]:
        """Tokenise the stretches between the template's special tokens one by one, with what is marked in them as text.

        `inside`: other text comes before, so there is no space to put at the start where a tokenizer does that.
        """
        ids: list[int] = []
        at, before = 0, None
        for start, end in [*self.special_spans(text), (len(text), len(text))]:
            stretch = text[at:start].lstrip() if before is not None and before.rstrip else text[at:start]
            spaced = not inside if before is None else self._spaces_after_special
            ids += self._stretch(stretch, spaced)
            if start < end:
                before = self._added[text[start:end]]
                ids += self.encode([before.content])[0]
            at = end
        return ids

    def _stretch(self, text: str, spaced: bool) -> list[int]:
        """Tokenise text without special tokens but with marks, at once or, if control tokens come of it, by marks."""
        for marks in (self._marked_extra, self._marked):
            ids: list[int] = []
            for i, part in enumerate(marks.split(text)):  # the odd ones are what was marked
                ids += self._spell(part) if i % 2 else self._as_text(self.unmark(part), spaced and i == 0)
            if not self.special_ids & set(ids):
                break
        return ids

    def _as_text(self, text: str, spaced: bool) -> list[int]:
        if text and self._spaces_text and not spaced:
            ids = self.encode(["\n" + text], as_text=True)[0]
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return self.encode([text], as_text=True)[0] if text else []

    def _spell(self, token: str) -> list[int]:
        """Give the ids of a control token's spelling as ordinary text."""
        if token not in self._spelled:
            whole = self._without_added_tokens(token)
            letters = [i for letter in token for i in self._without_added_tokens(letter)]
            candidates = [ids for ids in (whole, letters) if not self._control_ids & set(ids)]
            if not candidates:
                why = "the tokenizer has no other way to write it"
                raise DataError(f"text of the data would become the control token {token!r}", why=why)
            self._spelled[token] = candidates[0]
        return self._spelled[token]

    def _without_added_tokens(self, text: str) -> list[int]:
        """Run the tokenizer's own steps without its added tokens, special or not."""
        if not self.tokenizer.is_fast:
            return self.encode([text], as_text=True)[0]
        backend = self.tokenizer.backend_tokenizer

        def run(text: str) -> list[int]:
            if backend.normalizer is not None:
                text = backend.normalizer.normalize_str(text)
            words = [text]
            if backend.pre_tokenizer is not None:
                words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
            return [token.id for word in words for token in backend.model.tokenize(word)]

        newline, ids = run("\n"), run("\n" + text)
        return ids[len(newline) :] if self._spaces_text and ids[: len(newline)] == newline else run(text)

    def _find_bos(self) -> int | None:
        """Give the BOS id if the tokenizer by itself puts it in front of a text."""
        bos = self.tokenizer.bos_token_id
        first = self.tokenizer("a")["input_ids"][0]
        return bos if bos is not None and first == bos else None


def mark(text: str, pattern: re.Pattern[str]) -> str:
    """Put marks around what the pattern finds in text from the data. Raises RowError if it holds a mark already."""
    if START in text or END in text:
        raise RowError(f"the private character U+{ord(START):X} or U+{ord(END):X} stands in the text")
    return pattern.sub(f"{START}\\g<0>{END}", text)


def any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Compile a pattern that matches any of the texts, longer ones first; none at all if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _prefixes(piece: _Piece) -> list[str]:
    return [piece.text[:edge] for edge in piece.edges]


def _split(ids: list[int], prefixes: Sequence[list[int]]) -> list[list[int]] | None:
    """Split ids at the ends of the prefixes; None if one of them is no prefix of the ids."""
    if any(ids[: len(prefix)] != prefix for prefix in prefixes):
        return None
    ends = [0, *(len(prefix) for prefix in prefixes), len(ids)]
    return [ids[begin:end] for begin, end in pairwise(ends)]
