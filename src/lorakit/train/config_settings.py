"""From the tree of a file or of overrides to settings in our own names: `section.key` -> value with its place.

Short forms (`model: X`), keys without their section and other tools' names are all resolved here; what comes after
knows one spelling only.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from . import aliases
from .config_schema import ORDER, SHORT_FORM, all_keys, flat_names
from .yaml_nodes import Node, Problem, Unreadable, parse, pointer_part

EITHER_OR = (
    ("train.max_steps", "train.epochs"),
    ("train.batch_tokens", "train.batch_size"),
    ("method.last_n_layers", "method.layers"),
)

Settings: TypeAlias = dict[str, Node]  # by dotted key, in our names


@dataclass
class Findings:
    """What reading has to say to the user: problems stop it at the end, notices do not."""

    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def problem(self, node_or_where: Node | str, dotted: str, text: str) -> None:
        """Note something wrong with the key `dotted`."""
        where = node_or_where.where if isinstance(node_or_where, Node) else node_or_where
        self.problems.append(Problem(where, pointer(dotted), text))


def in_our_names(root: Node, findings: Findings) -> Settings:
    """Bring short forms, top-level keys and other tools' names into the form `section.key`."""
    settings: Settings = {}
    for key, node in root.value.items():
        if key == "output":
            _set(settings, "output", node, key, findings)
        elif key not in ORDER:
            _outer_key(settings, key, node, findings)
        elif isinstance(node.value, dict):
            for inner, item in node.value.items():
                _section_key(settings, key, inner, item, findings)
        elif key in SHORT_FORM and isinstance(node.value, str):
            _set(settings, f"{key}.{SHORT_FORM[key]}", node, key, findings)
        elif node.value is not None:
            findings.problem(node, key, f"must be a mapping of keys, got {shown(node)}")
    _either_or(settings, findings)
    return settings


def _outer_key(settings: Settings, key: str, node: Node, findings: Findings) -> None:
    if key in aliases.OTHER_NAMES:
        _other_tool(settings, key, key, node, findings)
    elif key in flat_names():
        findings.notices.append(f"{node.where}: {key} is read as {flat_names()[key]}")
        _set(settings, flat_names()[key], node, key, findings)
    else:
        findings.problem(node, key, f"unknown key {key!r}{near(key, [*ORDER, *flat_names(), *aliases.OTHER_NAMES])}")


def _section_key(settings: Settings, section: str, key: str, node: Node, findings: Findings) -> None:
    if key not in all_keys()[section] and key in aliases.OTHER_NAMES:
        _other_tool(settings, key, f"{section}.{key}", node, findings)
    else:
        _set(settings, f"{section}.{key}", node, f"{section}.{key}", findings)


def _other_tool(settings: Settings, key: str, written: str, node: Node, findings: Findings) -> None:
    try:
        meant = aliases.translate(key, node.plain())
    except ValueError as error:
        findings.problem(node, written, str(error))
        return
    if key in aliases.NEEDLESS:
        findings.notices.append(f"{node.where}: {key} is not needed: {aliases.NEEDLESS[key]}")
    elif not meant:
        findings.notices.append(f"{node.where}: {key}: {json.dumps(node.plain())} is the default")
    for dotted, value in meant.items():
        same = value == node.plain()
        findings.notices.append(f"{node.where}: {key} is read as {dotted}" + ("" if same else f": {json.dumps(value)}"))
        _set(settings, dotted, node if same else Node.of(value, node.where), written, findings)


def _set(settings: Settings, dotted: str, node: Node, written: str, findings: Findings) -> None:
    if dotted in settings:
        findings.problem(node, written, f"means {dotted}, which is already given at {settings[dotted].where}")
    else:
        settings[dotted] = node


def _either_or(settings: Settings, findings: Findings) -> None:
    for a, b in EITHER_OR:
        if _given(settings, a) and _given(settings, b):
            findings.problem(settings[a], a, f"{a} and {b} ({settings[b].where}) are both given; give one of them")


def _given(settings: Settings, key: str) -> bool:
    return key in settings and settings[key].value is not None


def read_overrides(overrides: Sequence[str], findings: Findings) -> Settings:
    """Read `key=value` texts; of a key given twice the last counts."""
    settings: Settings = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        where = f"command line ({text})"
        if not equals or not key:
            findings.problem(where, "", "must have the form key=value")
            continue
        node = Node(override_value(value, where).value, where)
        section, dot, inner = key.partition(".")
        meant: Settings = {}
        if dot and section in ORDER[:-1]:
            _section_key(meant, section, inner, node, findings)
        elif dot:
            findings.problem(node, key, f"unknown section {section!r}{near(section, ORDER)}")
        else:  # who types `lr=1e-4` needs no notice
            meant = in_our_names(Node({key: node}, where), Findings(findings.problems))
        settings |= meant
    _either_or(settings, findings)
    return settings


def override_value(text: str, where: str) -> Node:
    """Read the value of a `key=value` as YAML, or as the text that it is."""
    try:
        root, problems = parse(f"value: {text}", where)
    except Unreadable:
        return Node(text, where)  # not YAML: the text itself, such as a prompt with a colon in it
    return Node(text, where) if problems else root.value["value"]


def override(settings: Settings, key: str, node: Node) -> None:
    """Put an override's value in place of the file's, and take out what the file says instead of it."""
    for pair in EITHER_OR:
        if key in pair and node.value is not None:
            settings.pop(pair[1 - pair.index(key)], None)
    section, _, inner = key.partition(".")
    outer, dot, entry = inner.partition(".")
    if dot and outer in all_keys().get(section, ()):  # one entry of a mapping: method.rank_pattern.q_proj=8
        old = settings.get(f"{section}.{outer}")
        entries = old.value if old is not None and isinstance(old.value, dict) else {}
        if old is not None and isinstance(old.value, str):
            entries = {"name": old}  # `controller: relora` is short for `controller: {name: relora}`
        settings[f"{section}.{outer}"] = Node({**entries, entry: node}, node.where)
    else:
        settings[key] = node


def pointer(dotted: str) -> str:
    """Give the JSON pointer of a dotted key; a key of a mapping keeps its dots."""
    section, _, key = dotted.partition(".")
    return "".join(f"/{pointer_part(part)}" for part in (section, key) if part)


def shown(node: Node) -> str:
    """Give a value as a message shows it."""
    value = node.plain()
    text = f"the text {value!r}" if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def near(name: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    """Give the words `did you mean ...` with the nearest of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" → did you mean {close[0]!r}?" if close else ""
