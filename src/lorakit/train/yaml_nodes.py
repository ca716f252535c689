"""YAML 1.2 (core schema) with the place of every value kept, and limits on what a file may cost to read.

PyYAML splits the text into events; what the events mean is decided here, because PyYAML's own meaning is YAML 1.1:
there `1e-4` is a text, `no` is false and `012` is ten. Tags other than `!!str` are refused, so no text can name a
Python object.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

MAX_BYTES = 1_000_000
MAX_NODES = 10_000  # counted with every alias expanded
MAX_DEPTH = 20

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"(?P<dec>[-+]?[0-9]+)|0o(?P<oct>[0-7]+)|0x(?P<hex>[0-9a-fA-F]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it stands. The value is a scalar, a list of nodes or a dict of nodes."""

    value: Any
    where: str

    @classmethod
    def of(cls, value: Any, where: str) -> "Node":
        """Give plain Python objects as a tree that stands at one place."""
        if isinstance(value, list):
            return cls([cls.of(item, where) for item in value], where)
        if isinstance(value, dict):
            return cls({key: cls.of(item, where) for key, item in value.items()}, where)
        return cls(value, where)

    def plain(self) -> Any:
        """Give the value with plain Python objects all the way down."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


class Problem(NamedTuple):
    """One thing wrong with a configuration: where it stands, its JSON pointer ('' if none), and the matter."""

    where: str
    pointer: str
    text: str

    def __str__(self) -> str:
        """Give the line that the user sees."""
        matter = f"{self.pointer}: {self.text}" if self.pointer else self.text
        return f"{self.where}  {matter}" if self.where else matter


class Unreadable(Exception):
    """The text is not YAML at all, or too costly to read; reading stops here."""

    def __init__(self, where: str, text: str) -> None:
        """Keep the problem as one to report like the others."""
        self.problem = Problem(where, "", text)
        super().__init__(text)


def parse(text: str, name: str) -> tuple[Node, list[Problem]]:
    """Read one YAML document; places are `name:line`. An empty document is an empty mapping.

    Returns the tree and the problems that do not stop reading (duplicate keys, tags); raises Unreadable for others.
    """
    if len(text) > MAX_BYTES:
        raise Unreadable(name, f"larger than {MAX_BYTES // 1000} kB: not a configuration file")
    reader = _Reader(text, name)
    try:
        root = reader.document()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Unreadable(f"{name}:{line}", _syntax(error)) from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise Unreadable(name, str(error).splitlines()[0]) from None
    return root, reader.problems


def scalar(text: str) -> Any:
    """Give what a plain (unquoted) scalar means in YAML 1.2."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if match := _INT.fullmatch(text):
        base = {"dec": 10, "oct": 8, "hex": 16}[str(match.lastgroup)]
        digits = match[str(match.lastgroup)]
        return int(digits, base) if len(digits) < 1000 else float("inf")
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Reader:
    """Walks over the events of one document and keeps the anchors, the cost so far and the problems found."""

    def __init__(self, text: str, name: str) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self.name = name
        self.anchors: dict[str, tuple[Node, int]] = {}  # name -> node, number of nodes in it
        self.nodes = 0
        self.problems: list[Problem] = []

    def document(self) -> Node:
        next(self.events)  # stream start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return Node({}, self.name)
        root = self.node(next(self.events), "", 0)
        next(self.events)  # document end
        following = next(self.events)
        if not isinstance(following, yaml.StreamEndEvent):
            raise Unreadable(self.at(following), "a second document starts here; a configuration is one")
        return Node({}, self.name) if root.value is None else root

    def at(self, event: Any) -> str:
        return f"{self.name}:{event.start_mark.line + 1}"

    def node(self, event: Any, pointer: str, depth: int) -> Node:
        before = self.nodes
        self.count(event, 1)
        if depth > MAX_DEPTH:
            raise Unreadable(self.at(event), f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        if event.tag not in (None, "tag:yaml.org,2002:str"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.problems.append(Problem(self.at(event), pointer, f"the tag {tag} is not allowed"))
        if isinstance(event, yaml.ScalarEvent):
            plain = event.style is None and event.tag is None
            node = Node(scalar(event.value) if plain else event.value, self.at(event))
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Node(self.sequence(pointer, depth), self.at(event))
        else:
            node = Node(self.mapping(pointer, depth), self.at(event))
        if event.anchor:
            self.anchors[event.anchor] = node, self.nodes - before
        return node

    def alias(self, event: Any) -> Node:
        if event.anchor not in self.anchors:
            raise Unreadable(self.at(event), f"*{event.anchor} refers to nothing before it")
        node, size = self.anchors[event.anchor]
        self.count(event, size)
        return node

    def sequence(self, pointer: str, depth: int) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, f"{pointer}/{len(items)}", depth + 1))
        return items

    def mapping(self, pointer: str, depth: int) -> dict[str, Node]:
        items: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            where = self.at(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise Unreadable(where, "a key must be a plain text")
            key = event.value
            path = f"{pointer}/{pointer_part(key)}"
            value = self.node(next(self.events), path, depth + 1)
            if key in items:
                self.problems.append(Problem(where, path, f"given twice, first at {items[key].where}"))
            elif key == "<<" and event.style is None:
                self.problems.append(Problem(where, path, "merge keys are not part of YAML 1.2; write the keys out"))
            else:
                items[key] = Node(value.value, where)
        return items

    def count(self, event: Any, nodes: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise Unreadable(self.at(event), f"more than {MAX_NODES} values: not a configuration file")


def pointer_part(key: str) -> str:
    """Escape a key for a JSON pointer (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not YAML"
    if "'\\t'" in problem:
        return "a tab is used for indentation; use spaces"
    return f"not YAML: {problem}" + (f" ({error.context})" if error.context else "")
