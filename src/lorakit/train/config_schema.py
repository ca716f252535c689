"""The keys of a configuration as data: their types, ranges and descriptions, as pydantic models and as a JSON Schema.

Everything is read off the dataclasses; a new method brings its keys with it.
"""

import functools
import operator
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict, Field, create_model

from ..core.registry import INITS, METHODS
from ..core.target import Target
from ..optim import OPTIMIZERS
from .config import DEFAULT_METHOD, OUTPUT_HELP, SECTIONS, OneOf, OptimConfig
from .controllers import CONTROLLERS

ORDER = ("model", "data", "method", "optim", "train", "eval", "output")
SHORT_FORM = {"model": "name", "data": "path", "method": "name", "optim": "name"}  # `model: X` is `model: {name: X}`


class Key(NamedTuple):
    """One key of a section: its type, its default (MISSING if it must be given) and its description."""

    name: str
    hint: Any
    default: Any
    help: str


def section_keys(section: str, method: str = DEFAULT_METHOD) -> dict[str, Key]:
    """Give the keys of a section; those of `method` belong to the method of that name."""
    if section != "method":
        return _keys(SECTIONS[section])
    name = Key("name", _literal([method]), method if method == DEFAULT_METHOD else MISSING, "which adapter")
    return {"name": name, **_keys(METHODS[method]), **_keys(Target)}


@functools.cache
def all_keys() -> Mapping[str, Mapping[str, Key]]:
    """Give the keys of each section; for `method` those of every method together."""
    any_method: dict[str, Key] = {}
    for name in sorted(METHODS, key=lambda name: name == DEFAULT_METHOD):
        any_method |= section_keys("method", name)
    return {"method": any_method} | {name: section_keys(name) for name in SECTIONS}


@functools.cache
def flat_names() -> Mapping[str, str]:
    """Give {key: section.key} for the keys that only one section has, which need no section on a command line."""
    owners: dict[str, list[str]] = {}
    for section, keys in all_keys().items():
        for key in set(keys) - {"name", "path", "format"}:
            owners.setdefault(key, []).append(section)
    return {key: f"{found[0]}.{key}" for key, found in sorted(owners.items()) if len(found) == 1}


@functools.cache
def section_model(section: str, method: str = DEFAULT_METHOD) -> type[BaseModel]:
    """Give the pydantic model that checks a section. Strict: a text is no number, a number no truth value."""
    definitions: dict[str, Any] = {}
    for key in section_keys(section, method).values():
        default = ... if key.default is MISSING else key.default
        definitions[key.name] = (key.hint, Field(default, description=key.help))
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return create_model(section, __config__=config, **definitions)


def schema() -> dict[str, Any]:
    """Give the JSON Schema of a configuration file in its own names; it accepts no other tool's name for a key."""
    properties: dict[str, Any] = {}
    for section in ORDER[:-1]:
        methods = sorted(METHODS) if section == "method" else [DEFAULT_METHOD]
        forms = [section_model(section, name).model_json_schema() for name in methods]
        if section == "method":
            forms[methods.index("stack")]["properties"]["parts"]["items"] = _part_schema(methods)
        elif section == "train":
            forms[0]["properties"]["controller"] = _controller_schema()
        elif section == "optim":
            forms = [_optim_schema(forms[0], name) for name in sorted(OPTIMIZERS)]
        if section in SHORT_FORM:
            names = methods if section == "method" else choices(section_keys(section)[SHORT_FORM[section]].hint)
            forms.append({"enum": names} if names else {"type": "string", "minLength": 1})
        if section not in ("model", "data"):
            forms.append({"type": "null"})
        properties[section] = {"anyOf": forms}
    properties["output"] = {"type": "string", "minLength": 1, "description": OUTPUT_HELP}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lorakit configuration",
        "type": "object",
        "properties": properties,
        "required": ["model", "data"],
        "additionalProperties": False,
    }


def _controller_schema() -> dict[str, Any]:
    """A controller's name, or its name and settings."""
    forms = [{"type": "null"}, {"enum": sorted(CONTROLLERS)}]
    forms += [_named(name, CONTROLLERS[name]) for name in sorted(CONTROLLERS)]
    return {"anyOf": forms, "default": None, "description": section_keys("train")["controller"].help}


def _part_schema(methods: Sequence[str]) -> dict[str, Any]:
    """A method of a stack: its name and settings, without targets, for those are the stack's."""
    return {"anyOf": [_named(name, METHODS[name]) for name in methods if name != "stack"]}


def _named(name: str, cls: type[Any]) -> dict[str, Any]:
    """A name, and the settings of what has it."""
    form = _own_schema(cls)
    return {**form, "properties": {"name": {"const": name}, **form.get("properties", {})}, "required": ["name"]}


def _optim_schema(form: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The section as it is for one optimizer: its name and its own options."""
    options = _own_schema(vars(OPTIMIZERS.module(name)).get("Options"))
    own = {"name": {"const": name}, "options": {"anyOf": [{"type": "null"}, options]}}
    return {
        **form,
        "properties": {**form["properties"], **own},
        "required": [] if name == OptimConfig.name else ["name"],
    }


def _own_schema(cls: type[Any] | None) -> dict[str, Any]:
    """The settings that a file of a registry declares as a dataclass, if it does."""
    keys = _keys(cls).values() if cls is not None else ()
    definitions: dict[str, Any] = {k.name: (k.hint, Field(k.default, description=k.help)) for k in keys}
    return create_model("settings", __config__=ConfigDict(extra="forbid"), **definitions).model_json_schema()


def describe(hint: Any) -> str:
    """Say in words which values a type accepts."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _limited(arguments[0], arguments[1:])
    if origin is Literal:
        return arguments[0] if len(arguments) == 1 else "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}: " + ", ".join(describe(argument) for argument in arguments)
    if origin in (list, tuple, Sequence):
        return "a list, each " + describe(arguments[0])
    if origin in (dict, Mapping):
        return "a mapping from names to " + describe(arguments[1])
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    words[Any] = "values"
    return words[hint]


def choices(hint: Any) -> list[str]:
    """Give the texts that a type is limited to; nothing if it is not limited so."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint]
    parts = [p for part in parts for p in (get_args(part) if get_origin(part) in (tuple, list) else [part])]
    return [value for part in parts if get_origin(part) is Literal for value in get_args(part)]


def _keys(cls: type[Any]) -> dict[str, Key]:
    hints, help_lines = get_type_hints(cls, include_extras=True), key_help(cls)
    found = {}
    for f in fields(cls):
        hint = _literal(sorted(INITS)) if f.name == "init" else _closed(hints[f.name])
        default = f.default if f.default_factory is MISSING else f.default_factory()
        found[f.name] = Key(f.name, hint, default, help_lines.get(f.name, ""))
    return found


def key_help(cls: type[Any]) -> dict[str, str]:
    """Give what the docstring of `cls` says about each field, in the form `name: text` or `name, name: text`."""
    name = "|".join(f.name for f in fields(cls))
    parts = re.split(rf"(?<![\w.])((?:{name})(?:, (?:{name}))*): ", cls.__doc__ or "")
    said = zip(parts[1::2], parts[2::2], strict=True)
    return {key: " ".join(text.split()).rstrip(".") for names, text in said for key in names.split(", ")}


def _closed(hint: Any) -> Any:
    """Turn a text limited by OneOf, also inside a list or a union, into a Literal of the names there are."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limit = next((extra for extra in arguments[1:] if isinstance(extra, OneOf)), None)
        return hint if limit is None else _literal(sorted(limit.names))
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_closed, arguments))
    return origin[tuple(map(_closed, arguments))] if origin in (tuple, list) else hint


def _literal(names: Sequence[str]) -> Any:
    literal: Any = Literal  # made at run time, from the files there are
    return literal[tuple(names)]


def _limited(kind: Any, limits: Sequence[Any]) -> str:
    words = []
    for limit in limits:
        if isinstance(limit, Ge):
            words.append(f"at least {limit.ge}")
        elif isinstance(limit, Gt):
            words.append(f"greater than {limit.gt}")
        elif isinstance(limit, Le) and limit.le != 2**63 - 1:
            words.append(f"at most {limit.le}")
        elif isinstance(limit, Lt):
            words.append(f"less than {limit.lt}")
        elif isinstance(limit, MinLen):
            return f"{describe(kind)} that is not empty"
    return " ".join([describe(kind), " and ".join(words)]).strip()
