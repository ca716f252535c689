"""`lorakit chat`: a conversation in the terminal, with the adapter, without it, or both side by side."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import typer

from .generate import BASE, DTYPE, MODEL
from .opened import Opened
from .output import live, note, result, style

HELP = "/base and /adapter switch, /compare shows both, /reset forgets the conversation, /quit ends."
MODES = {"/base": "base", "/adapter": "adapter", "/compare": "compare"}
Message = dict[str, str]


def chat(
    adapter: str = MODEL,
    compare: bool = typer.Option(False, "--compare", help="Answer with the base model and with the adapter."),
    system: str = typer.Option(None, "--system", help="System message."),
    max_tokens: int = typer.Option(256, "--max-tokens", "--max-new-tokens", min=1, help="Longest answer."),
    temperature: float = typer.Option(0.0, "--temperature", min=0.0, help="0 takes the likeliest token."),
    top_p: float = typer.Option(
        1.0, "--top-p", min=0.0, max=1.0, help="Draw from the likeliest tokens of this weight."
    ),
    seed: int = typer.Option(0, "--seed", help="Start of the random numbers."),
    base: str = BASE,
    dtype: str = DTYPE,
) -> None:
    """Talk with an adapter.

    /base, /adapter and /compare switch while you talk; /reset forgets, /quit ends.
    """
    from .opened import open_model

    opened = open_model(adapter, base=base, dtype=dtype)
    mode = "base" if opened.adapter is None else "compare" if compare else "adapter"
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    Conversation(opened, system, mode, settings).run()


class Conversation:
    """What was said so far, and who answers next."""

    def __init__(self, opened: Opened, system: str | None, mode: str, settings: dict[str, Any]) -> None:
        self.opened, self.system, self.mode, self.settings = opened, system, mode, settings
        self.said: list[Message] = []

    def run(self) -> None:
        """Answer line by line until the input ends or /quit."""
        note(HELP)
        for line in lines():
            if line == "/quit":
                return
            if line == "/reset":
                self.said = []
                note("the conversation starts again")
            elif line in MODES:
                self.switch(MODES[line])
            elif line.startswith("/"):
                note(f"{line.split()[0]} is no command. {HELP}")
            else:
                self.answer(line)

    def switch(self, mode: str) -> None:
        """Change who answers."""
        if mode != "base" and self.opened.adapter is None:
            note("there is no adapter; this is the base model")
            return
        self.mode = mode
        note(f"now: {mode}")

    def answer(self, text: str) -> None:
        """Answer one message. The adapter's answer is the one the conversation goes on with, where both are given."""
        self.said.append({"role": "user", "content": text})
        reply = ""
        for who in ("base", "adapter") if self.mode == "compare" else (self.mode,):
            if self.mode == "compare":
                result(style(f"{who}:", "grey", sys.stdout))
            reply = self.write(who)
        self.said.append({"role": "assistant", "content": reply})

    def write(self, who: str) -> str:
        """Stream one answer to stdout and give it."""
        from ..core.attach import use
        from ..models.generate import generate, stream
        from .opened import ADAPTER

        model, tokenizer = self.opened.model, self.opened.tokenizer
        use(model, ADAPTER if who == "adapter" else None)
        if tokenizer.chat_template is None:  # no conversation: each text is continued by itself
            pieces = iter(generate(model, tokenizer, [self.opened.prompt(self.said[-1]["content"])], **self.settings))
        else:
            start = [{"role": "system", "content": self.system}] if self.system else []
            pieces = stream(model, tokenizer, start + self.said, **self.settings)
        written = []
        for piece in pieces:
            written.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
        result("")
        return "".join(written)


def lines() -> Iterator[str]:
    """Give what the user types, line by line, blank lines left out; the prompt sign appears on a terminal only."""
    typed = live(sys.stdin) and live(sys.stdout)
    if typed:
        with suppress(ImportError):  # gives `input` line editing and a history, where the system has it
            importlib.import_module("readline")
    while True:
        try:
            text = input("> ") if typed else next(sys.stdin, None)
        except EOFError:
            return
        if text is None:
            return
        if text.strip():
            yield text.strip()
