"""Names of layers: suffixes and regular expressions, the latter matched without backtracking.

Adapter files come from strangers, and Python's `re` tries one way after the other: `(a+)+Z`, or `.?` thirty times
and a `Z`, on a layer's path never ends. Here Python's parser makes the tree, and a match follows all ways at once:
from the set of positions where a part may begin to the set where it may end. A path of n characters has n + 1
positions, so the work is bounded; a budget of steps, shared by all patterns of one call, bounds what is left. What
depends on the order in which `re` tries (back-references, atomic groups, possessive repeats) and flags are refused;
everything else means what it means in `re`.
"""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from re import _constants as op  # ty: ignore[missing-module-member]
from re import _parser as parser  # ty: ignore[missing-module-member]
from typing import Any

from .errors import UsageError

MAX_LENGTH, MAX_DEPTH = 2000, 20
STEPS, STEPS_PER_NAME, STEPS_PER_CHARACTER = 1_000_000, 10_000, 20  # a million steps take about half a second

Positions = frozenset[int] | set[int]


def is_suffix(entry: str, path: str) -> bool:
    """Whether a plain name means this path: equal to it, or to its last components."""
    return path == entry or path.endswith("." + entry)


def suffixes(path: str) -> set[str]:
    """Give every plain name that means this path."""
    return {path, *(path[i + 1 :] for i, character in enumerate(path) if character == ".")}


class Budget:
    """Steps that matching patterns with `names` layer names may take; UsageError when they are used up."""

    def __init__(self, names: int) -> None:
        self.left = STEPS + STEPS_PER_NAME * names

    def spend(self, steps: int, pattern: str) -> None:
        """Take steps off."""
        self.left -= steps
        if self.left < 0:
            raise UsageError(
                f"{pattern[:100]!r} takes too long to match", fix="write it with fewer * and +, or list the layers"
            )


@dataclass(frozen=True)
class Pattern:
    """A regular expression that ends in bounded time."""

    text: str
    tree: Any
    budget: Budget

    def fullmatch(self, path: str) -> bool:
        """Whether the whole path matches, as in `re.fullmatch`."""
        return len(path) in self._ends(self.tree, {0}, path)

    def matches_end(self, path: str) -> bool:
        """Whether the path's last components match (or all of it): PEFT's rule for rank_pattern and alpha_pattern."""
        starts = {0} | {i + 1 for i, character in enumerate(path) if character == "."}
        return len(path) in self._ends(self.tree, starts, path)

    def _ends(self, tree: Iterable[Any], starts: Positions, path: str) -> Positions:
        """Give the positions where a match of `tree` that begins at one of `starts` may end."""
        for kind, argument in tree:
            self.budget.spend(1 + len(starts), self.text)
            starts = self._after(kind, argument, starts, path)
            if not starts:
                break
        return starts

    def _after(self, kind: Any, argument: Any, starts: Positions, path: str) -> Positions:
        if kind is op.SUBPATTERN:
            return self._ends(argument[-1], starts, path)
        if kind is op.BRANCH:
            return set().union(*(self._ends(branch, starts, path) for branch in argument[1]))
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeated(*argument, starts, path)
        if kind in (op.ASSERT, op.ASSERT_NOT):
            direction, body = argument
            back = body.getwidth()[0] if direction < 0 else 0
            return {i for i in starts if self._holds(body, i - back, i if back else None, path) is (kind is op.ASSERT)}
        if kind is op.AT:
            return {i for i in starts if _at(argument, i, path)}
        return {i + 1 for i in starts if i < len(path) and _is(kind, argument, path[i])}

    def _repeated(self, least: int, most: int, body: Any, starts: Positions, path: str) -> Positions:
        for _ in range(least):
            before, starts = starts, self._ends(body, starts, path)
            if starts == before:  # one more time changes nothing, so any number does not
                break
        reached = fresh = starts
        for _ in range(most - least):
            fresh = self._ends(body, fresh, path) - reached
            if not fresh:
                break
            reached = reached | fresh
        return reached

    def _holds(self, body: Any, start: int, end: int | None, path: str) -> bool:
        """Whether `body` matches from `start` to `end` (None: to anywhere)."""
        ends = self._ends(body, {start}, path) if start >= 0 else set()
        return bool(ends) if end is None else end in ends


def _at(code: Any, i: int, path: str) -> bool:
    if code in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
        return i == 0
    if code is op.AT_END_STRING:
        return i == len(path)
    if code is op.AT_END:
        return i == len(path) or path[i:] == "\n"
    inner, outer = (0 <= k < len(path) and _word(path[k]) for k in (i - 1, i))
    return (inner != outer) is (code is op.AT_BOUNDARY)


def _is(kind: Any, argument: Any, character: str) -> bool:
    """Whether a node for one character accepts this one."""
    if kind is op.LITERAL:
        return ord(character) == argument
    if kind is op.NOT_LITERAL:
        return ord(character) != argument
    if kind is op.ANY:
        return character != "\n"
    if kind is op.RANGE:
        return argument[0] <= ord(character) <= argument[1]
    if kind is op.CATEGORY:
        return _CATEGORIES[argument](character)
    if kind is op.IN:
        negated = argument[0][0] is op.NEGATE
        return any(_is(*item, character) for item in argument[negated:]) is not negated
    return False  # FAILURE: (?!)


def _word(character: str) -> bool:
    return character.isalnum() or character == "_"


_CATEGORIES = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_WORD: _word,
    op.CATEGORY_NOT_WORD: lambda c: not _word(c),
}


def compile_safe(pattern: str, budget: Budget) -> Pattern:
    """Read a regular expression; raises UsageError for one that is none, or that is not matched here."""
    if len(pattern) > MAX_LENGTH:
        raise UsageError(f"pattern of {len(pattern)} characters", fix=f"at most {MAX_LENGTH}; list the layers instead")
    budget.spend(STEPS_PER_CHARACTER * (1 + len(pattern)), pattern)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constructs whose meaning may change one day
            tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"{pattern[:100]!r} is not a regular expression", why=str(error)) from None
    if tree.state.flags & ~re.UNICODE or not _known(tree, MAX_DEPTH):
        raise UsageError(
            f"{pattern[:100]!r} cannot be matched",
            why="it uses flags, a back-reference, an atomic or possessive part, or too many brackets in brackets",
            fix="write it without, or list the layers",
        )
    return Pattern(pattern, tree, budget)


def _known(tree: Iterable[Any], depth: int) -> bool:
    """Whether every part of a parsed pattern is one that `Pattern` follows."""
    for kind, argument in tree:
        inner: Iterable[Any] = ()
        if kind is op.SUBPATTERN:
            if argument[1] or argument[2]:  # flags for a part
                return False
            inner = [argument[3]]
        elif kind is op.BRANCH:
            inner = argument[1]
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            inner = [argument[2]]
        elif kind in (op.ASSERT, op.ASSERT_NOT):
            inner = [argument[1]]
        elif kind not in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN, op.AT, op.FAILURE):
            return False
        if not depth or not all(_known(body, depth - 1) for body in inner):
            return False
    return True
