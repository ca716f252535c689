"""Chat rows rendered by the tokenizer's own template, with the answers found by rendering prefixes.

For the answer in turn i the template renders turns[:i] with its generation prompt and turns[:i+1] without. The second
must begin with the first, and the whole conversation with both: then the text between the two ends is the answer, and
it is what a model would be asked for at that point. Up to the template's end-of-turn token that text is trained. No
list of known templates is needed, and a template that rewrites history (by stripping reasoning, say) is found out.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.errors import DataError, UsageError
from .formats import Chat
from .messages import Message
from .rows import RowError
from .tokens import END, START, Codec, Rendered, Span, any_of, mark

if TYPE_CHECKING:
    import re

    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
R = TypeVar("R")

UNTRUSTED = ("user", "tool")  # roles whose text may come from anyone
DATE = "26 Jul 2024"  # for templates that write today's date unless given one: the data must not change overnight


@dataclass(slots=True)
class _Job:
    """One call of the template, and what came of it."""

    messages: list[Message]
    tools: list[Any] | None
    prompt: bool  # whether the template's generation prompt is added
    result: str | RowError = ""

    def text(self) -> str:
        if isinstance(self.result, RowError):
            raise self.result
        return self.result


@dataclass(frozen=True, slots=True)
class _Plan:
    """The calls a conversation needs: the whole, and for each answer what is before it and what ends with it."""

    whole: _Job
    answers: list[tuple[_Job, _Job]]

    def jobs(self) -> list[_Job]:
        return [self.whole, *(job for pair in self.answers for job in pair if job is not self.whole)]


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
        plans = [_attempt(self._plan, chat) for chat in chats]
        self._run([job for plan in plans if isinstance(plan, _Plan) for job in plan.jobs()])
        return [plan if isinstance(plan, RowError) else _attempt(self._rendered, plan) for plan in plans]

    def prompt_ids(self, messages: list[Message], tools: list[Any] | None = None) -> list[int]:
        """Tokenise a conversation up to where the model answers, exactly as training rows are. Raises DataError."""
        try:
            job = _Job(self._mark_chat(messages), _mark(tools, self._trusted), prompt=True)
            self._run([job])
            return self.codec.encode_rows([Rendered(job.text(), [])])[0].ids
        except RowError as error:
            raise DataError(f"these messages cannot be rendered: {error}") from None

    def _plan(self, chat: Chat) -> _Plan:
        messages, tools = self._mark_chat(chat.messages), _mark(chat.tools, self._trusted)
        whole = _Job(messages, tools, prompt=False)
        answers = []
        for turn in (turn for turn, trained in enumerate(chat.trained) if trained):
            before = _Job(messages[:turn], tools, prompt=True)
            is_last = turn + 1 == len(messages)
            answers.append((before, whole if is_last else _Job(messages[: turn + 1], tools, prompt=False)))
        return _Plan(whole, answers)

    def _rendered(self, plan: _Plan) -> Rendered:
        whole = plan.whole.text()
        if any(lone in self.codec.unmark(whole) for lone in (START, END)):
            raise RowError("the chat template takes apart text that looks like a control token")
        return Rendered(whole, [self._answer(whole, before.text(), after.text()) for before, after in plan.answers])

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

    def _run(self, jobs: Sequence[_Job]) -> None:
        """Run jobs, those without tools in one call for each setting."""
        for prompt in (False, True):
            self._run_alike([job for job in jobs if job.prompt is prompt and not job.tools])
        for job in jobs:
            if job.tools:
                self._run_alike([job])

    def _run_alike(self, jobs: Sequence[_Job]) -> None:
        """Run jobs of the same setting and tools in one call; if one fails, each by itself to find which."""
        if not jobs:
            return
        try:
            texts: Any = self.tokenizer.apply_chat_template(
                [job.messages for job in jobs],
                tools=jobs[0].tools,
                tokenize=False,
                add_generation_prompt=jobs[0].prompt,
                **self._options,
            )
        except Exception as error:  # a template is a program; it can raise anything
            jobs[0].result = RowError(f"the chat template refuses the messages: {error}")
            if len(jobs) > 1:
                for job in jobs:
                    self._run_alike([job])
            return
        for job, text in zip(jobs, texts, strict=True):
            job.result = text

    def _mark_chat(self, messages: Iterable[Message]) -> list[Message]:
        """Mark what looks like a control token: special tokens everywhere; from users and tools, all the template's."""
        marked = []
        for message in messages:
            pattern = self.codec.control_pattern if message.get("role") in UNTRUSTED else self._trusted
            marked.append({key: v if key == "role" else _mark(v, pattern) for key, v in message.items()})
        return marked


def _attempt(step: Callable[[T], R], value: T) -> R | RowError:
    try:
        return step(value)
    except RowError as error:
        return error


def _mark(value: Any, pattern: "re.Pattern[str]") -> Any:
    """Mark every text inside a JSON value."""
    if isinstance(value, str):
        return mark(value, pattern)
    if isinstance(value, dict):
        if any(pattern.search(str(key)) for key in value):
            raise RowError("a control token is the name of a field")
        return {key: _mark(inner, pattern) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mark(inner, pattern) for inner in value]
    return value


def _difference(expected: str, found: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    begin = max(0, at - 20)
    return f"has {_visible(expected[begin : at + 20])!r} become {_visible(found[begin : at + 20])!r}"


def _visible(text: str) -> str:
    return text.replace(START, "").replace(END, "")
