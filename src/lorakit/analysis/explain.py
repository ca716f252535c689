"""The theory in words: one topic per file in `topics/`, in English and Chinese, and how a topic is found from what a user types.

A topic is data (`topics/README.md` says which fields it has). Its example is a doctest and its check is one of
`lorakit selftest`; the tests run both, and compare every figure of its text with what the example prints.
"""

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .. import analysis
from ..core.errors import UsageError
from ..theory.formulas import FORMULAS
from ..theory.number import Kind

LANGUAGES = ("en", "zh")
LABELS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "formula": "formula",
        "symbols": "symbols",
        "holds": "holds when",
        "numbers": "your numbers",
        "measure": "measured by",
        "use": "what it tells",
        "limits": "do not use for",
        "evidence": "seen so far",
        "kind": "kind",
        "example": "worked out",
        "test": "proved by",
        "sources": "sources",
        "not measured": "not measured",
        "topics": "Topics",
        "other language": "中文",
        "give": "give",
        "null": "by chance or without effect",
        "median": "median of {} modules",
        "lowest": "lowest",
        "highest": "highest",
        "vacuity": "vacuity, where 1 and above says nothing:",
        "finished run": "a finished run of a LoRA with AdamW",
        "factors": "an adapter with factors A and B that are not zero",
        "exact": "exact: an identity, up to rounding",
        "estimate": "estimate: a statistic of a sample, with an interval",
        "bound": "bound: true, and possibly far from what is; see its vacuity",
        "heuristic": "heuristic: seen to hold on the runs it names, derived from nothing",
        "parametrisation": "parametrisation: of these factors A and B; others of the same change have another value",
    },
    "zh": {
        "formula": "公式",
        "symbols": "符号",
        "holds": "成立条件",
        "numbers": "你的数值",
        "measure": "如何测量",
        "use": "它说明什么",
        "limits": "不可用于",
        "evidence": "已有观察",
        "kind": "种类",
        "example": "算例",
        "test": "由何证明",
        "sources": "来源",
        "not measured": "未测量",
        "topics": "主题",
        "other language": "English",
        "give": "请给出",
        "null": "偶然或无作用时",
        "median": "{} 个模块的中位数",
        "lowest": "最低",
        "highest": "最高",
        "vacuity": "空洞比, 大于等于 1 即无信息:",
        "finished run": "用 AdamW 训练完的 LoRA 运行",
        "factors": "带有非零因子 A 和 B 的适配器",
        "exact": "精确: 恒等式, 只差舍入",
        "estimate": "估计: 样本统计量, 带区间",
        "bound": "界: 成立, 但可能离实际很远; 看它的空洞比",
        "heuristic": "经验: 在所列实验上成立, 没有推导",
        "parametrisation": "参数化: 只属于这一组 A 和 B; 同一改变的另一组因子给出另一个值",
    },
}


@dataclass(frozen=True)
class Text:
    """A topic in one language."""

    title: str
    question: str
    holds: str
    measure: str
    use: str
    limits: str
    evidence: str = ""
    """What was measured once, and on what: the only figures that no example prints."""


@dataclass(frozen=True)
class Topic:
    """One topic. `own`: the user's numbers it is about (`explain_numbers`); `formulas`: keys of `theory.formulas`."""

    name: str
    order: int
    words: tuple[str, ...]
    formula: str
    symbols: Mapping[str, Mapping[str, str]]
    """Symbol -> language -> meaning."""
    kind: Kind
    formulas: tuple[str, ...]
    test: str
    own: tuple[str, ...]
    command: str
    """Shown where a number is not to be had from files."""
    sources: tuple[str, ...]
    example: str
    texts: Mapping[str, Text]

    def json(self, language: str) -> dict[str, Any]:
        """Give it for machines, in one language."""
        return {
            "topic": self.name,
            **vars(self.texts[language]),
            "language": language,
            "formula": self.formula,
            "formula_ids": {name: FORMULAS[name]._asdict() for name in self.formulas},
            "symbols": {symbol: meaning[language] for symbol, meaning in self.symbols.items()},
            "kind": str(self.kind),
            "test": self.test,
            "command": self.command,
            "sources": list(self.sources),
            "example": self.example,
        }


@functools.cache
def topics() -> Mapping[str, Topic]:
    """Read all topics, in their order."""
    folder = resources.files(analysis).joinpath("topics")
    pages = {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}
    glossary = _yaml(pages.pop("_symbols").read_text("utf-8"))
    found = [read(name, file.read_text("utf-8"), glossary) for name, file in pages.items()]
    return {topic.name: topic for topic in sorted(found, key=lambda topic: topic.order)}


def read(name: str, text: str, glossary: Mapping[str, Mapping[str, str]]) -> Topic:
    """Make a topic of its file. TypeError for a field too many or too few, KeyError for a symbol that nobody explains."""
    fields = _yaml(text)
    texts = {language: Text(**fields.pop(language)) for language in LANGUAGES}
    own: Mapping[str, Mapping[str, str]] = fields.pop("define", {})
    symbols = {symbol.replace(",", ", "): {**glossary, **own}[symbol] for symbol in fields.pop("symbols").split()}
    lists: dict[str, Any] = {key: tuple(fields.pop(key, ())) for key in ("words", "formulas", "own", "sources")}
    kind = Kind(fields.pop("kind"))
    return Topic(name=name, texts=texts, symbols=symbols, kind=kind, **lists, **fields)


def find(query: Sequence[str]) -> list[Topic]:
    """Give the topics that words mean: the one of that name, those of a formula id, else all in which every word occurs.

    A word finds what begins with it. Raises UsageError with the nearest names if there is none.
    """
    name = "-".join(query).lower().replace("_", "-").replace(" ", "-")
    if name in topics():
        return [topics()[name]]
    by_id = [t for t in topics().values() if name in {f.replace("_", "-") for f in (*t.formulas, *t.own)}]
    if by_id:
        return by_id
    words = name.split("-")
    by_name = [t for t in topics().values() if set(words) <= set(t.name.split("-"))]
    by_alias = [t for t in topics().values() if name in {word.replace(" ", "-") for word in t.words}]
    for found in (by_name, by_alias):
        if len(found) == 1:
            return found
    found = [t for t in topics().values() if all(_occurs(word, _searched(t)) for word in words)]
    if found and any(words):
        return found
    near = nearest(name)
    fix = f"did you mean {', '.join(near)}?" if near else "lorakit explain lists the topics"
    raise UsageError(f"no topic {' '.join(query)!r}", fix=fix)


def nearest(name: str, count: int = 4) -> list[str]:
    """Give the names of the topics whose name or one of whose words is spelled nearly so."""
    spelled: dict[str, str] = {}
    for topic in topics().values():
        for word in (*topic.name.split("-"), *topic.words, *topic.formulas):
            spelled.setdefault(word.lower().replace("_", "-").replace(" ", "-"), topic.name)
        spelled[topic.name] = topic.name
    close = difflib.get_close_matches(name, spelled, n=2 * count, cutoff=0.6)
    return list(dict.fromkeys(spelled[word] for word in close))[:count]


def _searched(topic: Topic) -> str:
    said = (f"{text.title} {text.question}" for text in topic.texts.values())
    text = " ".join(["", topic.name, *topic.words, *topic.formulas, *said])
    return re.sub(r"[-_(/,?]", " ", text.lower())


def _occurs(word: str, text: str) -> bool:
    return f" {word}" in text if word.isascii() else word in text


def _yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)
