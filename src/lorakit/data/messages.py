"""Chat messages checked and brought to one form: a list of {role, content, ...} and which of them are trained."""

import difflib
from typing import Any

from .json_rows import kind
from .rows import RowError

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
SWITCHES = ("train", "weight", "loss")  # a message with one of them false or 0 is context only

Message = dict[str, Any]


def check_messages(value: Any, system: Any = None) -> tuple[list[Message], list[bool]]:
    """Give the messages and, for each, whether its tokens are trained; `system` is a row's own column of that name.

    Trained is every answer (role assistant) not switched off, except one nothing precedes: its mask could not be told
    from the rest of the prompt. An empty system message is kept, since it switches a template's default one off.
    Raises RowError.
    """
    if not isinstance(value, list) or not value:
        raise RowError("the list of messages is empty" if value == [] else f"messages are {kind(value)}, not a list")
    messages, trained = [], []
    for turn, item in enumerate(value, 1):
        try:
            message, switched_on = _message(item)
        except RowError as error:
            raise RowError(f"message {turn}: {error}") from None
        messages.append(message)
        trained.append(switched_on and message["role"] == "assistant" and turn > 1)
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        trained.insert(0, False)
    _check_order([message["role"] for message in messages], trained)
    return messages, trained


def content_text(value: Any) -> str:
    """Give the text of a message: a text, or a list of text parts joined. Raises RowError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f"the content is {kind(value)}, not text")
    parts = []
    for part in value:
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif isinstance(part, str):
            parts.append(part)
        else:
            what = part.get("type", "an unknown") if isinstance(part, dict) else kind(part)
            raise RowError(f"the content has {what!r} as a part; only text is trained")
    return "".join(parts)


def _message(item: Any) -> tuple[Message, bool]:
    if not isinstance(item, dict):
        raise RowError(f"{kind(item)}, not an object with role and content")
    item = {key: value for key, value in item.items() if value is not None}
    role = _role(item.get("role", item.get("from")))
    content = content_text(item.get("content", item.get("value", "" if item.get("tool_calls") else None)))
    if not content.strip() and (role == "user" or (role == "assistant" and not item.get("tool_calls"))):
        raise RowError(f"the content of {role!r} is empty")
    others = {key: v for key, v in item.items() if key not in ("role", "from", "content", "value", *SWITCHES)}
    return {"role": role, "content": content, **others}, all(_switch(item, name) for name in SWITCHES)


def _role(value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(f"the role is {kind(value)}; it must be one of {', '.join(ROLES)}")
    role = ROLE_NAMES.get(value.lower(), value.lower())
    if role not in ROLES:
        near = difflib.get_close_matches(role, ROLES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it must be one of {', '.join(ROLES)}"
        raise RowError(f"unknown role {value!r}; {hint}")
    return role


def _switch(item: Message, name: str) -> bool:
    value = item.get(name, True)
    if value not in (True, False):  # 1 and 0, also as 1.0 and 0.0, are equal to these
        raise RowError(f"{name} is {value!r}; a message is trained (true, 1) or not (false, 0)")
    return bool(value)


def _check_order(roles: list[str], trained: list[bool]) -> None:
    if roles.count("system") > 1:
        raise RowError(f"{roles.count('system')} system messages; join them into one")
    if "system" in roles[1:]:
        raise RowError(f"the system message is number {roles.index('system') + 1}; it must be the first")
    if "assistant" not in roles:
        raise RowError("no message is from 'assistant'; nothing to train on in this row")
    if roles[-1] != "assistant":
        raise RowError(f"last message is from {roles[-1]!r}; nothing to train on in this row")
    if not any(trained):
        why = "nothing comes before the answer" if roles.count("assistant") == len(roles) else "no answer is trained"
        raise RowError(f"{why}; nothing to train on in this row")
