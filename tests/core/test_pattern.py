"""Regular expressions matched by sets of positions mean what they mean in Python's `re`, and always end."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.errors import UsageError
from lorakit.core.pattern import Budget, compile_safe, is_suffix, suffixes

PIECES = [
    "a",
    "b",
    r"\.",
    ".",
    "[ab]",
    "[^a.]",
    r"\d",
    r"\w",
    r"\W",
    r"\s",
    "[a-c0-3_]",
    "^",
    "$",
    r"\b",
    "",
    r"\Z",
    "(?!)",
    "(?<=a)",
    "(?<!b)",
]
EXPRESSIONS = st.recursive(
    st.sampled_from(PIECES),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?", "{2,}"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
        inner.map("(?={})".format),
        inner.map("(?!{})".format),
    ),
    max_leaves=6,
)


@settings(max_examples=1500, deadline=None, database=None)
@given(EXPRESSIONS, st.text("ab.1_ \n", min_size=1, max_size=7))
def test_patterns_mean_what_they_mean_to_python(expression: str, path: str) -> None:
    """Sets of positions against `re`'s backtracking: the same language; and PEFT's rule for the end of a path."""
    pattern = compile_safe(expression, Budget(1))
    assert pattern.fullmatch(path) == bool(re.fullmatch(expression, path))
    end = re.fullmatch(rf"(?:[^\n]*\.)?(?:{expression})", path)
    assert "\n" in path or pattern.matches_end(path) == bool(end)


PATHS = [
    f"model.layers.{i}.{name}" for i in range(30) for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
]


@pytest.mark.parametrize(
    "expression", ["((a+)+)+Z", ".?" * 30 + "Z", "(?:.|..)" * 30 + "Z", ".*" * 500 + "Z", "((((.*)*)*)*)*Z"]
)
def test_matching_ends(expression: str) -> None:
    """Python's own matcher needs years for most of these; here the answer is no, or that it would take too long."""
    began = time.process_time()
    try:
        pattern = compile_safe(expression, Budget(len(PATHS)))
        assert not any(pattern.fullmatch(path) for path in PATHS)
    except UsageError as error:
        assert "too long" in error.what
    assert time.process_time() - began < 3


def test_what_people_write_is_within_the_budget() -> None:
    """A pattern for each layer, as tools write them, and one with many repeats, on all paths of a model."""
    budget = Budget(len(PATHS))
    each = [compile_safe(re.escape(path), budget) for path in PATHS]
    assert [[path for path in PATHS if pattern.matches_end(path)] for pattern in each] == [[path] for path in PATHS]
    wide = compile_safe(r".*\.layers\.(\d|1\d|2[0-4])\.(self_attn|mlp)\..*(q|k|v|up)_proj", budget)
    assert sum(map(wide.fullmatch, PATHS)) == 50


@pytest.mark.parametrize(
    "expression", [r"(a)\1", "(?>a)", "a*+", "(?i)a", "(?i:a)", "(" * 40 + ")" * 40, "(", "[", "a" * 3000]
)
def test_what_is_not_followed_is_refused(expression: str) -> None:
    with pytest.raises(UsageError):
        compile_safe(expression, Budget(1))


@given(st.text("ab.", max_size=8), st.text("ab.", min_size=1, max_size=8))
def test_suffixes_are_the_plain_names(entry: str, path: str) -> None:
    assert (entry in suffixes(path)) == is_suffix(entry, path)
