"""Prompts and completions as plain text, for models without a chat template.

A prompt is written by a format with one place, `{prompt}`, which generation has to use again: as it is, with a line end
behind it, or the Alpaca form. The completion follows, then the end token.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.errors import DataError
from .formats import Pair
from .rows import RowError
from .tokens import Codec, Rendered, mark

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{prompt}"


def plain_format(pairs: Sequence[Pair], given: str | None = None) -> str:
    """Choose how prompts are written: `given`, else as they are if every pair has a space or line end where it joins.

    Without one ("What is 2+2?" and "4") prompt and answer would run into each other, so a line end is put in between.
    """
    joined = all(pair.prompt[-1:].isspace() or pair.completion[:1].isspace() for pair in pairs)
    return given or (PLACE if joined else PLACE + "\n")


def write_prompt(format: str, prompt: str, system: str | None = None) -> str:
    """Write a prompt in a format, after the system text and a blank line if there is one."""
    return (f"{system}\n\n" if system else "") + format.replace(PLACE, prompt)


def render_pair(pair: Pair, format: str, codec: Codec) -> Rendered:
    """Give the text of a pair with its completion to train. Raises RowError."""
    prompt = mark(write_prompt(format, pair.prompt, pair.system), codec.control_pattern)
    text = prompt + mark(pair.completion, codec.control_pattern)
    return Rendered(text, [(len(prompt), len(text))])


def plain_prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str, format: str = PLACE) -> list[int]:
    """Tokenise a prompt as training did: in its format, BOS in front if the tokenizer writes one, no control tokens.

    Raises DataError.
    """
    codec = Codec(tokenizer)
    try:
        text = mark(write_prompt(format, prompt), codec.control_pattern)
    except RowError as error:
        raise DataError(f"this prompt cannot be tokenised: {error}") from None
    return codec.encode_rows([Rendered(text, [])])[0].ids
