"""`lorakit generate`: answers to prompts."""

import sys

import typer

from ..core.errors import UsageError
from .output import json_result, result

MODEL = typer.Argument(
    ..., metavar="ADAPTER", help="Adapter or run directory; a base model works too.", show_default=False
)
BASE = typer.Option(None, "--base", "--model", help="Base model, if not the one the adapter names.")
DTYPE = typer.Option("auto", "--dtype", help="float32 or bfloat16; auto is what the hardware computes natively.")


def generate(
    adapter: str = MODEL,
    prompt: list[str] = typer.Option(None, "--prompt", "-p", help="Prompt; may be repeated. Without one: stdin."),
    system: str = typer.Option(None, "--system", help="System message for models with a chat template."),
    max_tokens: int = typer.Option(256, "--max-tokens", "--max-new-tokens", min=1, help="Longest answer."),
    temperature: float = typer.Option(0.0, "--temperature", min=0.0, help="0 takes the likeliest token."),
    top_p: float = typer.Option(
        1.0, "--top-p", min=0.0, max=1.0, help="Draw from the likeliest tokens of this weight."
    ),
    seed: int = typer.Option(0, "--seed", help="Start of the random numbers."),
    stop: list[str] = typer.Option(None, "--stop", help="End before this text; may be repeated."),
    base: str = BASE,
    dtype: str = DTYPE,
    json: bool = typer.Option(False, "--json", help="Print a list of {prompt, text}."),
) -> None:
    """Answer prompts."""
    prompts = list(prompt or [])
    if not prompts and not sys.stdin.isatty():
        prompts = [text] if (text := sys.stdin.read().strip()) else []
    if not prompts:
        raise UsageError("no prompt", fix="--prompt TEXT, or a text on stdin")
    from ..models.generate import generate as write
    from .opened import open_model

    opened = open_model(adapter, base=base, dtype=dtype)
    texts = write(
        opened.model,
        opened.tokenizer,
        [opened.prompt(text, system) for text in prompts],
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop or None,
    )
    if json:
        json_result([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)])
        return
    for text in texts:
        result(text)
