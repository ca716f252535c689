"""Settings that one file of a registry declares as a dataclass: a controller's, an optimizer's own, a stacked method's."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from .errors import UsageError


def own_settings(cls: type[Any], given: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Check settings and give all of them, with the defaults, as plain values. Raises what `checked` raises."""
    return asdict(checked(cls, given, owner))


def checked(cls: type[Any], given: Mapping[str, Any], owner: str) -> Any:
    """Make the dataclass of settings that are checked by its types and rules.

    Raises UsageError for an unknown name, a wrong type (a text is no number) and what the dataclass itself refuses.
    """
    from pydantic import TypeAdapter, ValidationError

    known = [f.name for f in fields(cls)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"{owner} has no setting {key!r}", fix=f"{hint}it has: {', '.join(known)}")
    try:
        text = json.dumps(dict(given), allow_nan=False)
    except (TypeError, ValueError):
        raise UsageError(
            f"{owner}: {dict(given)!r:.100} are no settings", fix="give finite numbers and texts"
        ) from None
    try:
        return TypeAdapter(cls).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UsageError):  # from the dataclass's own __post_init__
            raise cause from None
        key = ".".join(map(str, first["loc"]))
        raise UsageError(f"{owner}.{key}: {first['msg']}", why=f"it is {first['input']!r}") from None
