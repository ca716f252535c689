"""Chat rows rendered by the tokenizer's own template, with the answers found by rendering prefixes.

For the answer in turn i the template renders turns[:i] with its generation prompt and turns[:i+1] without. The second
must begin with the first, and the whole conversation with both: then the text between the two ends is the answer, and
it is what a model would be asked for at that point. Up to the template's end-of-turn token that text is trained. No
list of known templates is needed, and a template that rewrites history (by stripping reasoning, say) is found out.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError, UsageError
from .formats import Chat
from .messages import Message
from .rows import RowError
from .tokens import END, START, Codec, Rendered, Span, any_of

if TYPE_CHECKING:
    import re

    from transformers import PreTrainedTokenizerBase

UNTRUSTED = ("user", "tool")  # roles whose text may come from anyone
DATE = "26 Jul 2024"  # for templates that write today's date unless given one: the data must not change overnight


@dataclass(frozen=True, slots=True)
class _Job:
    messages: list[Message]
    tools: list[Any] | None
    prompt: bool  # whether the template's generation prompt is added


class ChatTemplate:
    """The chat template of a tokenizer. Raises UsageError if it has none."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        source = tokenizer.chat_template
        if not source:
            why = "the model is a base model, or its directory lacks chat_template.jinja"
            fix = "give rows with prompt and completion (train.task: completion), or put a chat_template.jinja into it"
            raise UsageError("the tokenizer has no chat template, so it cannot write messages", why=why, fix=fix)
        self.source = "\n".join(source.values()) if isinstance(source, dict) else source
        self.fingerprint = hashlib.sha256(self.source.encode()).hexdigest()[:12]
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self.codec = Codec(tokenizer, [token for token in added if token in self.source and not token.isspace()])
        self._trusted = any_of(self.codec.special)
        self._options: dict[str, Any] = {"date_string": DATE} if "date_string" in self.source else {}

    def render(self, chats: Sequence[Chat]) -> list[Rendered | RowError]:
        """Render conversations; one that the template refuses or rewrites gives its RowError instead."""
        jobs: list[_Job] = []
        plans: list[list[tuple[int, int, int]] | RowError] = []  # a trained turn: its number and its two jobs
        for chat in chats:
            try:
                messages, tools = self._mark_chat(chat.messages), self._mark(chat.tools, self._trusted)
            except RowError as error:
                plans.append(error)
                continue
            plan, last = [], len(jobs)
            jobs.append(_Job(messages, tools, prompt=False))
            for turn in (turn for turn, trained in enumerate(chat.trained) if trained):
                jobs.append(_Job(messages[:turn], tools, prompt=True))
                if turn + 1 < len(messages):
                    jobs.append(_Job(messages[: turn + 1], tools, prompt=False))
                    plan.append((last, len(jobs) - 2, len(jobs) - 1))
                else:
                    plan.append((last, len(jobs) - 1, last))
            plans.append(plan)
        texts = self._run(jobs)
        return [plan if isinstance(plan, RowError) else self._rendered(plan, texts) for plan in plans]

    def prompt_ids(self, messages: list[Message], tools: list[Any] | None = None) -> list[int]:
        """Tokenise a conversation up to where the model answers, exactly as training rows are. Raises DataError."""
        job = _Job(self._mark_chat(messages), self._mark(tools, self._trusted), prompt=True)
        text = self._run([job])[0]
        if isinstance(text, RowError):
            raise DataError(f"these messages cannot be rendered: {text}")
        return self.codec.encode_rows([Rendered(text, [])])[0].ids

    def _rendered(self, plan: list[tuple[int, int, int]], texts: list[str | RowError]) -> Rendered | RowError:
        spans = []
        for whole, before, after in plan:
            rendered = [texts[whole], texts[before], texts[after]]
            for text in rendered:
                if isinstance(text, RowError):
                    return text
            try:
                spans.append(self._answer(*rendered))  # ty: ignore[invalid-argument-type]
            except RowError as error:
                return error
        whole = str(texts[plan[0][0]])
        if any(mark in self.codec.unmark(whole) for mark in (START, END)):
            return RowError("the chat template takes apart text that looks like a control token")
        return Rendered(whole, spans)

    def _answer(self, whole: str, before: str, after: str) -> Span:
        """Find the answer in the whole text: from the end of the prompt to the end-of-turn token."""
        if not after.startswith(before):
            raise RowError(
                "the chat template does not go on from its own generation prompt: it "
                f"{_difference(before, after)}, so what is trained would not be what is asked for at generation"
            )
        if not whole.startswith(after):
            raise RowError(
                f"the chat template rewrites earlier answers once more turns follow: it {_difference(after, whole)}; "
                'mark all answers but the last "train": false, or write one row per answer'
            )
        ends = [
            end for start, end in self.codec.special_spans(after) if start >= len(before) and not after[end:].strip()
        ]
        return len(before), ends[-1] if ends else len(after)

    def _run(self, jobs: Sequence[_Job]) -> list[str | RowError]:
        texts: list[str | RowError] = [""] * len(jobs)
        for prompt in (False, True):
            together = [i for i, job in enumerate(jobs) if job.prompt is prompt and not job.tools]
            apart = [i for i, job in enumerate(jobs) if job.prompt is prompt and job.tools]
            for group in (together, *([i] for i in apart)):
                for i, text in zip(group, self._run_alike([jobs[i] for i in group]), strict=True):
                    texts[i] = text
        return texts

    def _run_alike(self, jobs: Sequence[_Job]) -> list[str | RowError]:
        """Render conversations with the same settings in one call; if one fails, each by itself to find which."""
        if not jobs:
            return []
        try:
            texts: Any = self.tokenizer.apply_chat_template(
                [job.messages for job in jobs],
                tools=jobs[0].tools,
                tokenize=False,
                add_generation_prompt=jobs[0].prompt,
                **self._options,
            )
            return texts
        except Exception as error:  # a template is a program; it can raise anything
            if len(jobs) > 1:
                return [self._run_alike([job])[0] for job in jobs]
            return [RowError(f"the chat template refuses the messages: {error}")]

    def _mark_chat(self, messages: Iterable[Message]) -> list[Message]:
        """Mark what looks like a control token: special tokens everywhere; from users and tools, all the template's."""
        pattern = self.codec.control_pattern
        return [
            {
                key: value
                if key == "role"
                else self._mark(value, pattern if message["role"] in UNTRUSTED else self._trusted)
                for key, value in message.items()
            }
            for message in messages
        ]

    def _mark(self, value: Any, pattern: "re.Pattern[str]") -> Any:
        if isinstance(value, str):
            if START in value or END in value:
                raise RowError(f"the private character U+{ord(START):X} or U+{ord(END):X} stands in the text")
            return pattern.sub(f"{START}\\g<0>{END}", value)
        if isinstance(value, dict):
            if any(pattern.search(str(key)) for key in value):
                raise RowError("a control token is the name of a field")
            return {key: self._mark(inner, pattern) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._mark(inner, pattern) for inner in value]
        return value


def _difference(expected: str, found: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    begin = max(0, at - 20)
    return f"has {_visible(expected[begin : at + 20])!r} become {_visible(found[begin : at + 20])!r}"


def _visible(text: str) -> str:
    return text.replace(START, "").replace(END, "")
