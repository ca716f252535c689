"""From messages to token ids, so that only the template, never a user, writes control tokens."""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from ..core.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Prompt = str | list[Message] | list[int]
_PRIVATE = range(0xE000, 0xF8FF)  # characters that Unicode leaves to private agreement


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """Token ids of a prompt: a text is one user message if there is a chat template, else plain text; ids stay so."""
    if isinstance(prompt, str):
        if tokenizer.chat_template is None:
            return _ids(tokenizer, prompt, split_special_tokens=True)
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    tokens = [entry for entry in prompt if isinstance(entry, int)]
    return tokens if len(tokens) == len(prompt) else encode_chat(tokenizer, [m for m in prompt if isinstance(m, dict)])


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> list[int]:
    """Token ids of the rendered conversation, up to where the assistant speaks next.

    A control token typed into a message becomes ordinary text. To tell it from the template's own, it is rendered as a
    number between two private-use characters, and put back in the stretches between the control tokens. Encoding those
    one by one gives the ids of the whole, since no token reaches across a control token.
    """
    control = control_tokens(tokenizer)
    typed = "".join(_strings(messages))
    if not any(token in typed for token in control):
        text = render(tokenizer, messages)
        return _with_bos(tokenizer, _ids(tokenizer, text, add_special_tokens=False))
    begin, end = (chr(code) for code in [c for c in _PRIVATE if chr(c) not in typed][:2])
    any_control = re.compile("(" + "|".join(map(re.escape, control)) + ")")
    hidden = re.compile(f"{begin}([0-9]+){end}")
    marked = _mapped(messages, lambda text: any_control.sub(lambda m: f"{begin}{control.index(m[0])}{end}", text))
    ids: list[int] = []
    for i, piece in enumerate(any_control.split(render(tokenizer, marked))):
        if i % 2:  # `split` puts what matched at the odd places
            ids.append(cast(int, tokenizer.convert_tokens_to_ids(piece)))
        else:
            text = hidden.sub(lambda m: control[int(m[1])], piece)
            ids += _ids(tokenizer, text, add_special_tokens=False, split_special_tokens=True)
    return _with_bos(tokenizer, ids)


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The special tokens of the vocabulary, longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(special, key=lambda token: (-len(token), token))


def end_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The ids that end an answer: the end-of-text token, and the control token the template writes after a reply."""
    ends: set[Any] = {tokenizer.eos_token_id}
    if tokenizer.chat_template is not None:
        reply = "reply"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": reply}]
        try:
            after = render(tokenizer, turns, generation_prompt=False).rpartition(reply)[2]
        except UsageError:  # a template for other conversations than these
            after = ""
        written = [(after.find(token), token) for token in control_tokens(tokenizer) if token in after]
        if written:
            ends.add(tokenizer.convert_tokens_to_ids(min(written)[1]))
    return ends - {None}


def render(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], generation_prompt: bool = True) -> str:
    """The text the chat template makes of `messages`. UsageError when the template refuses them."""
    from jinja2.exceptions import TemplateError

    if tokenizer.chat_template is None:
        raise UsageError("this tokenizer has no chat template", fix="give the prompt as a text, not as messages")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))
    except (TemplateError, TypeError, KeyError) as error:
        raise UsageError("the chat template does not accept these messages", why=str(error)) from error


def _with_bos(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[int]:
    """Begin with the beginning-of-text token where the tokenizer would and the template did not; never twice."""
    begins = [tokenizer.bos_token_id]
    wanted = _ids(tokenizer, "x")[:1] == begins
    return begins + ids if wanted and ids[:1] != begins else ids


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, **options: bool) -> list[int]:
    return list(tokenizer(text, verbose=False, **options)["input_ids"])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _strings(entry)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    if isinstance(value, list):
        return [_mapped(entry, change) for entry in value]
    return value
