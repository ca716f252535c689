"""`lorakit explain`: the theory behind every number, with the user's own number beside the formula."""

import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import UsageError
from .output import json_result, result, style

if TYPE_CHECKING:
    from ..analysis.explain import Topic
    from ..analysis.explain_numbers import Own
    from ..theory.number import Number

WIDEST = 100
INDENT = "    "
NEVER_FIRST = "，。；：、）！？,.;:)!?」”"


def explain(
    topic: list[str] = typer.Argument(None, metavar="[TOPIC]", help="A topic, a formula id, or words to search for."),
    lang: str = typer.Option("en", "--lang", "-l", help="en or zh."),
    adapter: str = typer.Option(None, "--adapter", "-a", help="Adapter or run directory: your numbers."),
    base: str = typer.Option(None, "--base", help="Base model: the numbers that need its weights."),
    run: Path = typer.Option(None, "--run", help="Run directory: the numbers that the run recorded."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Explain a formula or a number, in English or Chinese.

    What it answers, the formula with its symbols, when it holds, how it is measured, what it must not be used for, the check
    of `lorakit selftest` that proves it and a worked example; with --adapter, --base or --run your own number and what it
    would be by chance. Without a topic: the list of topics. `lorakit explain stable_rank` finds a formula id of any report.
    """
    from ..analysis.explain import LANGUAGES, find, topics

    if lang not in LANGUAGES:
        raise UsageError(f"--lang {lang} is not written", fix=f"one of {', '.join(LANGUAGES)}")
    found = find(topic) if topic else list(topics().values())
    if not topic and (adapter or base or run):
        raise UsageError("which topic?", fix="lorakit explain TOPIC --adapter DIR; lorakit explain lists them")
    if len(found) > 1:
        listed(found, lang, json)
        return
    own = _own(found[0], adapter, base, run)
    if json:
        json_result(
            {
                **found[0].json(lang),
                "numbers": {name: number.json() for name, number in own.numbers.items()},
                "not_measured": dict(own.missing),
            }
        )
    else:
        for line in page(found[0], lang, own):
            result(line)


def listed(found: Sequence["Topic"], lang: str, json: bool) -> None:
    """Print names, titles and questions."""
    if json:
        keys = ("title", "question")
        json_result({"topics": [{"topic": t.name, **{k: t.json(lang)[k] for k in keys}} for t in found]})
        return
    width = max(len(t.name) for t in found)
    for t in found:
        result(f"{style(t.name.ljust(width), 'bold', sys.stdout)}  {t.texts[lang].title}")
        if len(found) < 8:
            result(f"{' ' * width}  {t.texts[lang].question}")
    result("\nlorakit explain TOPIC [--lang zh] [--adapter DIR] [--base MODEL] [--run DIR]")


def _own(topic: "Topic", adapter: str | None, base: str | None, run: Path | None) -> "Own":
    from ..analysis.explain_numbers import own_numbers
    from .machine import set_threads
    from .opened import require_adapter

    set_threads()
    weights = None
    if base is not None:
        from ..analysis.base_weights import BaseWeights
        from ..models.resolve import resolve

        if adapter is None and run is None:
            raise UsageError("--base alone measures nothing", fix="--adapter DIR --base MODEL")
        weights = BaseWeights(resolve(base))
    directory = None if adapter is None else require_adapter(adapter)
    if run is None and directory is not None and (directory.parent / "metrics.jsonl").is_file():
        run = directory.parent
    return own_numbers(topic.own, directory, weights, run)


def page(topic: "Topic", lang: str, own: "Own") -> Iterator[str]:
    """Give a topic as lines for the terminal."""
    from ..analysis.explain import LABELS

    label, text = LABELS[lang], topic.texts[lang]
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)

    def block(name: str, lines: Sequence[str]) -> Iterator[str]:
        yield style(label[name], "bold", sys.stdout)
        yield from (f"{INDENT}{line}".rstrip() for line in lines)

    def prose(name: str) -> Iterator[str]:
        return block(name, wrapped(vars(text)[name], width - len(INDENT)))

    yield f"{style(text.title, 'bold', sys.stdout)}  ({topic.name})"
    yield from wrapped(text.question, width)
    yield ""
    yield from block("formula", topic.formula.splitlines())
    size = max(map(_columns, topic.symbols))
    meanings = [f"{symbol}{' ' * (size - _columns(symbol))}  {said[lang]}" for symbol, said in topic.symbols.items()]
    yield from block("symbols", meanings)
    yield from block("numbers", [*_numbers(own, label, width), *_missing(topic, own, label)])
    for name in ("holds", "measure", "use", "limits", *(("evidence",) if text.evidence else ())):
        yield from prose(name)
    yield from block("example", topic.example.splitlines())
    yield from block("kind", [label[str(topic.kind)]])
    yield from block("test", [f"lorakit selftest --only {topic.test}"])
    yield from block("sources", topic.sources)


def _numbers(own: "Own", label: Mapping[str, str], width: int) -> Iterator[str]:
    for name, number in own.numbers.items():
        yield from wrapped(said(name, number, label), width - len(INDENT))


def said(name: str, number: "Number", label: Mapping[str, str]) -> str:
    """Give a number in a line: value, interval, null, kind, and over how many modules it is the median."""
    inputs: Mapping[str, Any] = number.inputs
    between = "" if number.interval is None else f" [{number.interval[0]:.4g}, {number.interval[1]:.4g}]"
    parts = [f"{name.replace('_', ' ')} {number.value:.5g}{between} ({number.kind})"]
    if number.null is not None:
        parts.append(f"{label['null']} {number.null:.4g}")
    if "vacuity" in inputs:
        parts.append(f"{label['vacuity']} {inputs['vacuity']:.4g}")
    if "lowest" in inputs and inputs["modules"] > 1:
        parts.append(label["median"].format(inputs["modules"]))
        parts += [f"{label[end]} {inputs[end][1]:.4g} {inputs[end][0]}" for end in ("lowest", "highest")]
    return "; ".join(parts)


def _missing(topic: "Topic", own: "Own", label: Mapping[str, str]) -> Iterator[str]:
    from ..analysis.explain import LABELS

    sentences = {LABELS["en"][key]: label[key] for key in ("finished run", "factors")}
    for name, why in own.missing.items():
        yield f"{label['not measured']}: {name.replace('_', ' ')} ({label['give']}: {sentences.get(why, why)})"
    if not topic.own:
        yield f"{label['not measured']}: {topic.command}"


def wrapped(text: str, width: int) -> list[str]:
    """Break a text into lines of at most so many columns; between Chinese characters too, but not before a full stop."""
    if all(unicodedata.east_asian_width(c) not in "WF" for c in text):
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    lines, line = [], ""
    for piece in _pieces(text):
        if line and _columns(line + piece.rstrip()) > width and piece[0] not in NEVER_FIRST:
            lines.append(line.rstrip())
            line = piece.lstrip()
        else:
            line += piece
    return [*lines, line.rstrip()]


def _pieces(text: str) -> Iterator[str]:
    """Give what must stay together: words with the blank after them, wide characters one by one."""
    word = ""
    for char in text:
        wide = unicodedata.east_asian_width(char) in "WF"
        if wide and word:
            yield word
            word = ""
        if wide:
            yield char
        else:
            word += char
            if char == " ":
                yield word
                word = ""
    if word:
        yield word


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
