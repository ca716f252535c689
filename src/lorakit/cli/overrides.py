"""Command lines that carry configuration: `CONFIG.yaml optim.lr=1e-4 --max-steps 60 --lora_r 8`.

Flags are the keys of the dataclasses, with or without their section, and the names other tools use. They become the
same `key=value` texts that stand without dashes, and mean what the file would mean with that line in it.
"""

import difflib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from ..core.errors import UsageError

if TYPE_CHECKING:
    from ..train.config_schema import Key

SHORT = {"-o": "output", "-c": "config"}


def split(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Give the configuration file and the overrides in a command line; a run directory stands for its config.yaml.

    Raises UsageError for unknown flags, flags without a value and a second file.
    """
    files: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-"):
            (overrides if "=" in token and not Path(token).exists() else files).append(token)
            continue
        flag, equals, value = token.partition("=")
        key = _key(flag)
        if not equals:
            value = _value(flag, key, rest)
        if key == "config":
            files.append(value)
        else:
            overrides.append(f"{key}={value}")
    if len(files) > 1:
        fix = "one configuration file, then key=value or --key value"
        raise UsageError(f"more than one configuration file: {' '.join(files)}", fix=fix)
    return (_config_file(Path(files[0])) if files else None), overrides


def help_text() -> str:
    """Give the list of all configuration keys as flags, for --help."""
    from ..train.config_schema import section_keys

    rows = [("  --model NAME", "short for --model.name"), ("  --data PATH", "short for --data.path")]
    rows += [("  -o, --output DIR", "directory of the run; runs/<name of the data> when absent")]
    for section in ("model", "data", "method", "optim", "train", "eval"):
        rows.append((f"{section}:", ""))
        for key in section_keys(section).values():
            rows.append((f"  --{section}.{key.name.replace('_', '-')}", _about(key, f"{section}.{key.name}")))
    width = max(len(flag) for flag, _ in rows) + 2
    lines = [wrap(f"{flag.ljust(width)}{text}", columns(), subsequent_indent=" " * width) for flag, text in rows]
    intro = "Configuration keys, as flags or as key=value; the section may be left out where only one has the key:"
    return "\n".join([intro, "", *("\n".join(line) for line in lines)])


def columns() -> int:
    """Give the width of help texts."""
    return min(shutil.get_terminal_size().columns, 120)


def _about(key: "Key", dotted: str) -> str:
    """Describe a key: its line, the names it takes, its default."""
    from dataclasses import MISSING

    from ..core.registry import METHODS
    from ..train.config_file import flow
    from ..train.config_schema import choices

    names = sorted(METHODS) if dotted == "method.name" else choices(key.hint)
    listed = f" ({', '.join(map(str, names))})" if names else ""
    return key.help + listed + ("" if key.default in (MISSING, None, "", ()) else f" [{flow(key.default)}]")


def _config_file(path: Path) -> Path:
    return path / "config.yaml" if path.is_dir() else path


def _value(flag: str, key: str, rest: list[str]) -> str:
    """Take a flag's value off the command line; a flag that is true or false may stand alone."""
    if flag.startswith("--no-"):
        if not _is_switch(key):
            raise UsageError(f"unknown option {flag}", why=f"{key} is no switch", fix=f"--{key} VALUE")
        return "false"
    if _is_switch(key):
        values = ("true", "false", *_other_values(key))
        return rest.pop(0) if rest and (rest[0].lower() in values or _counts(key, rest[0])) else "true"
    if not rest:
        raise UsageError(f"{flag} needs a value", fix=f"{flag} VALUE")
    return rest.pop(0)


def _key(flag: str) -> str:
    """Give the key that a flag names, as an override names it."""
    if flag in SHORT:
        return SHORT[flag]
    plain = flag.removeprefix("--").replace("-", "_")
    known = set(_known())
    for name in (plain, plain.removeprefix("no_")):
        if flag.startswith("--") and name in known:
            return name
    near = difflib.get_close_matches(plain, known, n=1)
    hint = f"did you mean --{near[0].replace('_', '-')}? " if near else ""
    raise UsageError(f"unknown option {flag}", fix=f"{hint}--help lists all of them")


def _known() -> Iterator[str]:
    from ..train.aliases import OTHER_NAMES
    from ..train.config_schema import ORDER, all_keys, flat_names

    yield "config"
    yield from ("model", "data", "method", "output")
    yield from flat_names()
    yield from OTHER_NAMES
    for section in ORDER[:-1]:
        yield from (f"{section}.{key}" for key in all_keys()[section])


def _is_switch(key: str) -> bool:
    """Say whether a key is true or false, or can be."""
    from ..train.aliases import CONVERTED, NEEDLESS

    if key in CONVERTED:
        return key in ("lora_target_linear", "bf16", "fp16", "load_in_4bit", "load_in_8bit")
    if key in NEEDLESS:
        return key in ("logging_first_step", "use_peft", "remove_unused_columns")
    return bool in _types(key)


def _other_values(key: str) -> list[str]:
    """Give the texts that a switch may be besides true and false."""
    from ..train.config_schema import choices

    return [text for kind in _types(key) for text in choices(kind)]


def _counts(key: str, text: str) -> bool:
    """Say whether `text` is a number, and the switch may be one."""
    return text.isdigit() and any(get_origin(kind) is Annotated for kind in _types(key))


def _types(key: str) -> Sequence[Any]:
    """Give the types that a key may have."""
    from ..train.aliases import RENAMED
    from ..train.config_schema import all_keys, flat_names

    section, dot, name = RENAMED.get(key, flat_names().get(key, key)).partition(".")
    if not dot:
        return ()
    hint = all_keys()[section][name].hint
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
