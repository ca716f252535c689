"""Write `docs/theory/`: a page for each topic of `lorakit explain`, in English and, below `zh/`, in Chinese, and an index of each.

    python docs/generate_theory.py

Nothing on these pages is written by hand; the texts are the files in `src/lorakit/analysis/topics`, and for `tools.md` the newest
result of `benchmarks/tools_compared.py`. `tests/analysis/test_explain.py`
compares the pages with them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from lorakit.analysis.explain import LABELS, LANGUAGES, Topic, topics
from lorakit.theory.formulas import FORMULAS

PAGES = Path(__file__).parents[1] / "docs" / "theory"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FOLDERS = {"en": "", "zh": "zh/"}
INTRODUCTION = {
    "en": (
        "# The theory, and what it is good for\n\nOne page per topic of `lorakit explain`, made from the same files. Every formula "
        "names the check of `lorakit selftest` that proves it, and the examples are run by the tests. With an adapter "
        "(`lorakit explain TOPIC --adapter DIR --base MODEL --run DIR`) the same page shows your own numbers."
    ),
    "zh": (
        "# 理论与用途\n\n`lorakit explain --lang zh` 的每个主题一页, 由同样的文件生成。"
        "每个公式都写明证明它的 `lorakit selftest` 检查, 算例由测试运行。"
        "给出适配器(`lorakit explain TOPIC --lang zh --adapter DIR --base MODEL --run DIR`), 同一页会显示你自己的数值。"
    ),
}

TOOLS = {
    "en": "Measured: [who gives the right number for an adapter](tools.md), lorakit, PEFT's tools or weightwatcher.",
    "zh": "实测: [谁给出适配器的正确数值](../tools.md)(英文), 比较 lorakit, PEFT 自带工具和 weightwatcher。",
}


def page(topic: Topic, language: str) -> str:
    """Write the page of a topic."""
    label, text = LABELS[language], topic.texts[language]
    other = f"zh/{topic.name}.md" if language == "en" else f"../{topic.name}.md"
    parts = [f"# {escaped(text.title)}", f"[{label['other language']}]({other})", f"*{escaped(text.question)}*"]

    def section(name: str, body: str) -> None:
        parts.extend([f"## {label[name].capitalize()}", body])

    section("formula", fenced(topic.formula, "text"))
    section("symbols", "\n".join(f"- `{symbol}`: {escaped(said[language])}" for symbol, said in topic.symbols.items()))
    for name in ("holds", "measure", "use", "limits", *(("evidence",) if text.evidence else ())):
        section(name, escaped(vars(text)[name]))
    section("example", fenced(topic.example, "python"))
    section("kind", escaped(label[str(topic.kind)]))
    ids = ", ".join(f"`{name}` ({FORMULAS[name].test})" for name in topic.formulas)
    section("test", f"`lorakit selftest --only {topic.test}`; {ids}")
    own = (
        f"`lorakit explain {topic.name} --adapter DIR --base MODEL --run DIR`: {', '.join(topic.own).replace('_', ' ')}"
    )
    section("numbers", own if topic.own else f"`{topic.command}`")
    section("sources", "\n".join(f"- {source}" for source in topic.sources))
    return "\n\n".join(parts) + "\n"


def index(language: str) -> str:
    """Write the page that lists all."""
    label, other = LABELS[language], {"en": "zh/README.md", "zh": "../README.md"}[language]
    rows = [
        f"{t.order}. [{t.texts[language].title}]({t.name}.md): {escaped(t.texts[language].question)}"
        for t in topics().values()
    ]
    return (
        "\n\n".join([INTRODUCTION[language], f"[{label['other language']}]({other})", "\n".join(rows), TOOLS[language]])
        + "\n"
    )


def tools() -> str:
    """Give the newest comparison with other tools, as it was written."""
    results = sorted(RESULTS.glob("tools-compared_*.md"), key=lambda path: path.stem.rpartition("_")[2])
    return f"[Index](README.md)\n\n{results[-1].read_text('utf-8')}"


def fenced(text: str, language: str) -> str:
    """Give a block of code."""
    return f"```{language}\n{text.rstrip()}\n```"


def escaped(text: str) -> str:
    """Give prose in which < is no tag and * and _ are no emphasis, outside of code."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = parts[i].replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    return "`".join(parts)


def pages() -> Iterator[tuple[Path, str]]:
    """Give (path below `docs/theory`, text) of every page."""
    for language in LANGUAGES:
        for topic in topics().values():
            yield Path(f"{FOLDERS[language]}{topic.name}.md"), page(topic, language)
        yield Path(f"{FOLDERS[language]}README.md"), index(language)
    yield Path("tools.md"), tools()


def main() -> None:
    """Write the pages, and take away those of topics that are gone."""
    options = argparse.ArgumentParser(description="Write docs/theory/.")
    options.add_argument("--output", type=Path, default=PAGES)
    output = options.parse_args().output
    made = {output / path: text for path, text in pages()}
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for path in set(output.rglob("*.md")) - made.keys():
        path.unlink()


if __name__ == "__main__":
    main()
