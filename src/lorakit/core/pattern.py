"""Names of layers: suffixes and regular expressions, the latter only where they cannot run away.

Adapter files come from strangers, and Python's `re` backtracks: `((a+)+)+Z` on a layer's path never ends. So a pattern is
compiled only if its tree has no repeat inside a repeat and few repeats at all; the cost is then polynomial of low degree.
"""

import re
from collections.abc import Iterable
from re import _constants as opcode
from re import _parser as parser
from typing import Any

from .errors import UsageError

MAX_LENGTH, MAX_REPEATS = 2000, 4


def is_suffix(entry: str, path: str) -> bool:
    """Whether a plain name means this path: equal to it, or to its last components."""
    return path == entry or path.endswith("." + entry)


def compile_safe(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression that ends in bounded time on a layer's path, or raise UsageError."""
    if len(pattern) > MAX_LENGTH:
        raise UsageError(f"pattern of {len(pattern)} characters", fix=f"at most {MAX_LENGTH}; list the layers instead")
    try:
        repeats = _repeats(parser.parse(pattern), inside=False)
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"{pattern!r} is not a regular expression", why=str(error)) from None
    if repeats > MAX_REPEATS:
        raise UsageError(
            f"{pattern!r} could take very long to match",
            why=f"it has a repeat inside a repeat, or more than {MAX_REPEATS} repeats",
            fix="write it with fewer * and +, or list the layers",
        )
    return compiled


def _repeats(tree: Iterable[Any], *, inside: bool) -> int:
    """Count the unbounded repeats of a parsed pattern; one inside another, or a choice inside one, counts as too many."""
    total = 0
    for op, argument in tree:
        if op in (opcode.MAX_REPEAT, opcode.MIN_REPEAT, opcode.POSSESSIVE_REPEAT):
            low, high, body = argument
            unbounded = high - low > 1
            if inside and unbounded:
                return MAX_REPEATS + 1
            total += unbounded + _repeats(body, inside=inside or unbounded)
        elif op is opcode.BRANCH:
            if inside:
                return MAX_REPEATS + 1
            total += max(_repeats(branch, inside=inside) for branch in argument[1])
        elif op is opcode.SUBPATTERN:
            total += _repeats(argument[-1], inside=inside)
        elif op in (opcode.ASSERT, opcode.ASSERT_NOT):
            total += _repeats(argument[1], inside=inside)
        elif op is opcode.ATOMIC_GROUP:
            total += _repeats(argument, inside=inside)
        elif op in (opcode.GROUPREF, opcode.GROUPREF_EXISTS):
            return MAX_REPEATS + 1
    return total
