"""Configuration files: read one (with `key=value` overrides), write one.

Whatever is wrong is reported at once, each problem with its line and its JSON pointer.
Precedence: override, file, default.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..core.errors import UsageError
from ..core.registry import METHODS
from ..core.target import Target
from .aliases import OTHER_NAMES
from .config import DEFAULT_METHOD, SECTIONS, MethodConfig, RunConfig, as_tree
from .config_check import contradictions
from .config_schema import ORDER, all_keys, choices, describe, section_keys, section_model
from .config_settings import Findings, Settings, in_our_names, near, override, pointer, read_overrides, shown
from .yaml_nodes import MAX_BYTES, Node, Problem, Unreadable, parse


def load(path: Path | str | None, overrides: Sequence[str] = ()) -> tuple[RunConfig, list[str]]:
    """Read a configuration file (none: only the overrides `key=value`) and give it with the notices about it.

    Raises UsageError with every problem there is.
    """
    if path is None:
        return loads("", overrides, "command line")
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        return loads(content.decode("utf-8-sig"), overrides, str(path))
    except OSError as error:
        fix = "give the path of a YAML file; `lorakit init DATA` writes one"
        raise UsageError(f"cannot read the configuration {path}", why=error.strerror, fix=fix) from None
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise UsageError(f"{path} is not a text in UTF-8", why=wrong, fix="save it as UTF-8") from None


def place_of(path: Path | str, key: str) -> str | None:
    """Give `file:line` of the first key of this name in a configuration file, in whatever section; None if it has none."""
    root, _ = parse(Path(path).read_text("utf-8-sig"), str(path))
    sections = [root, *root.value.values()]
    return next(
        (node.value[key].where for node in sections if isinstance(node.value, dict) and key in node.value), None
    )


def loads(text: str, overrides: Sequence[str] = (), name: str = "config") -> tuple[RunConfig, list[str]]:
    """Read a configuration from YAML text; messages call the text `name`. See `load`."""
    findings = Findings()
    try:
        root, findings.problems = parse(text, name)
    except Unreadable as error:
        raise _refusal(name, [error.problem]) from None
    if not isinstance(root.value, dict):
        findings.problem(root, "", f"a configuration is a mapping of sections: {', '.join(ORDER)}")
        raise _refusal(name, findings.problems)
    settings = in_our_names(root, findings)
    for key, node in read_overrides(overrides, findings).items():
        override(settings, key, node)
    config = _Builder(settings, name, findings).run_config()
    if config is not None and not findings.problems:
        for key, matter in contradictions(config):
            findings.problem(settings.get(key, Node(None, name)), key, matter)
    if config is None or findings.problems:
        raise _refusal(name, findings.problems)
    return config, findings.notices


def check(config: RunConfig) -> None:
    """Check a configuration made in Python by the rules for files; raises UsageError with every problem there is."""
    problems = [Problem("", pointer(key), matter) for key, matter in contradictions(config)]
    if problems:
        raise _refusal("configuration", problems)
    loads(dump(config), name="configuration")


def dump(config: RunConfig) -> str:
    """Give the complete configuration as YAML; reading it gives an equal configuration."""
    tree = as_tree(config)
    if config.train.max_steps is not None:
        del tree["train"]["epochs"]  # without meaning then, and a file that gives both is refused
    if config.train.batch_tokens is not None:
        del tree["train"]["batch_size"]
    lines = []
    for section, value in tree.items():
        if isinstance(value, dict):
            lines += [f"{section}:", *(f"  {key}: {flow(item)}" for key, item in value.items()), ""]
        else:
            lines += [f"{section}: {flow(value)}", ""]
    return "\n".join(lines[:-1]) + "\n"


def flow(value: Any) -> str:
    """Give a value as one line of YAML: plain if that reads back as the same text, otherwise as JSON."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./-]*", value, re.ASCII):
        return value if value.lower() not in ("null", "true", "false") else json.dumps(value)
    text = json.dumps(value, ensure_ascii=False)
    # Characters that YAML does not allow as they are, or takes for the end of a line.
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def default_output(data: str) -> str:
    """Give the run directory for a data path when none is named: runs/<name without endings>."""
    return f"runs/{re.split(r'[.#]', Path(data).name)[0] or 'run'}"


@dataclass
class _Builder:
    """Makes the dataclasses from the settings and notes what is wrong with them, section by section."""

    settings: Settings
    name: str
    findings: Findings

    def run_config(self) -> RunConfig | None:
        sections = {section: self.construct(cls, self.checked(section), section) for section, cls in SECTIONS.items()}
        method = self.method()
        output = self.settings.get("output", Node(None, self.name))
        if output.value is not None and not (isinstance(output.value, str) and output.value):
            self.findings.problem(output, "output", f"must be a text that is not empty, got {shown(output)}")
        if method is None or None in sections.values() or self.findings.problems:
            return None
        directory = output.value or default_output(sections["data"].path)
        return RunConfig(**sections, method=method, output=directory)

    def method(self) -> MethodConfig | None:
        chosen = self.settings.get("method.name", Node(DEFAULT_METHOD, self.name))
        if chosen.value not in list(METHODS):
            matter = f"unknown method {shown(chosen)}{near(str(chosen.value), METHODS)}"
            self.findings.problem(chosen, "method.name", f"{matter}; there are: {', '.join(METHODS)}")
            return None
        values = self.checked("method", chosen.value)
        if values is None:
            return None
        cls = METHODS[chosen.value]
        config = self.construct(cls, {f.name: values[f.name] for f in fields(cls) if f.name in values}, "method")
        target = Target(**{f.name: values[f.name] for f in fields(Target) if f.name in values})
        return None if config is None else MethodConfig(name=chosen.value, config=config, target=target)

    def checked(self, section: str, method: str = DEFAULT_METHOD) -> dict[str, Any] | None:
        """Check the values of a section with pydantic and give them converted; None (and problems) if any is wrong."""
        given = [key for key in self.settings if key.startswith(f"{section}.")]
        nodes = {key.partition(".")[2]: self.settings[key] for key in given}
        values = {key: _whole(node.plain()) for key, node in nodes.items()}
        try:
            found = section_model(section, method).model_validate_json(json.dumps(values))
            return {key: getattr(found, key) for key in values}
        except ValidationError as error:
            for key in dict.fromkeys(str(e["loc"][0]) for e in error.errors()):
                node = nodes.get(key, Node(None, self.name))
                self.findings.problem(node, f"{section}.{key}", _matter(section, method, key, nodes.get(key)))
            return None

    def construct(self, cls: type[Any], values: dict[str, Any] | None, section: str) -> Any:
        """Make the dataclass. What its own checks refuse is tried key by key, so that each problem gets its line."""
        if values is None:
            return None
        try:
            return cls(**values)
        except ValueError as error:
            before = len(self.findings.problems)
            name = {"name": values["name"]} if "name" in values else {}  # what the other keys may mean depends on it
            for key, value in values.items():
                try:
                    cls(**{**name, key: value})
                except ValueError as alone:
                    self.findings.problem(self.settings[f"{section}.{key}"], f"{section}.{key}", _in_one_line(alone))
            if len(self.findings.problems) == before:
                self.findings.problem(self.name, section, _in_one_line(error))
            return None


def _in_one_line(error: ValueError) -> str:
    parts = (error.what, error.why, error.fix) if isinstance(error, UsageError) else (str(error),)
    return "; ".join(part for part in parts if part)


def _matter(section: str, method: str, key: str, node: Node | None) -> str:
    """Say what is wrong with one key of a section."""
    keys = section_keys(section, method)
    if node is None:
        example = {"model.name": "model: smollm2", "data.path": "data: train.jsonl"}.get(f"{section}.{key}")
        return "is missing" + (f'; for example "{example}"' if example else f"; it must be {describe(keys[key].hint)}")
    if key in keys:
        hint = keys[key].hint
        return f"must be {describe(hint)}, got {shown(node)}{near(str(node.value), choices(hint))}"
    homes = [f"{s}.{key}" for s, names in all_keys().items() if key in names and s != section]
    if homes:
        return f"unknown key {key!r} in {section}; it is {' or '.join(homes)}"
    if section == "method" and key in all_keys()["method"]:
        return f"{method} has no {key!r}; it has {', '.join(keys)}"
    return f"unknown key {key!r}{near(key, [*keys, *OTHER_NAMES])}"


def _whole(value: Any) -> Any:
    """Write 1e3 as 1000: JSON Schema knows no difference, and a number of steps may be spelled so."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _refusal(name: str, problems: Sequence[Problem]) -> UsageError:
    problems = sorted(problems, key=_line)
    if len(problems) == 1:
        return UsageError(str(problems[0]))
    return UsageError("\n  ".join([f"{name}: {len(problems)} problems", *map(str, problems)]))


def _line(problem: Problem) -> tuple[str, int]:
    place, _, line = problem.where.rpartition(":")
    return (place, int(line)) if line.isdigit() else ("~", 0)
