"""Reading one field of a record: a text, a label, a list of messages.

Every function raises `NotARow` with a reason that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from posttrain.data.rows import Message, Messages, Role

_ROLES: dict[str, Role] = {
    **{role: role for role in get_args(Role)},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "observation": "tool",
}
"""Role names of OpenAI's and ShareGPT's formats, and what they are here."""


class NotARow(Exception):
    """A record cannot become a row; the message is the reason."""


def parse_text(fields: Mapping[str, object], column: str) -> str:
    """A text with something in it."""
    if column not in fields:
        raise NotARow(f"`{column}` is missing")
    return _text(fields[column], f"`{column}`")


def parse_optional_text(fields: Mapping[str, object], column: str) -> str:
    """A text, or an empty string for one that is absent, null or blank."""
    value = fields.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return _text(value, f"`{column}`")


def parse_label(value: object) -> bool | None:
    """`true` or `false`, also as CSV writes them; None for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return None


def parse_messages(value: object, where: str) -> Messages:
    """Messages with known roles and some content; a system message only at the start."""
    if not isinstance(value, list | tuple):
        raise NotARow(f"{where} must be a list of messages, not {type(value).__name__}")
    if not value:
        raise NotARow(f"{where} is empty")
    messages = tuple(_message(item, f"{where}[{index}]") for index, item in enumerate(value))
    for index, message in enumerate(messages):
        if message.role == "system" and index > 0:
            raise NotARow(f"{where}[{index}]: a system message may only stand first")
    return messages


def parse_prompt(value: object, where: str) -> Messages:
    """A prompt: a string, which the user says, or messages that do not end with the assistant."""
    if isinstance(value, list | tuple):
        messages = parse_messages(value, where)
    else:
        messages = (Message("user", _text(value, where)),)
    return check_prompt(messages, where)


def check_prompt(messages: Messages, where: str) -> Messages:
    """The messages, if it is the assistant's turn after them."""
    if not messages:
        raise NotARow(f"{where} is empty")
    if messages[-1].role not in ("user", "tool"):
        raise NotARow(f"{where} must end with the user's turn, not the {messages[-1].role}'s")
    return messages


def parse_reply(value: object, where: str) -> Messages:
    """A continuation: a string, which the assistant says, a message, or messages."""
    if isinstance(value, str):
        return (Message("assistant", _text(value, where)),)
    if isinstance(value, Mapping):
        return (_message(value, where),)
    return parse_messages(value, where)


def check_reply(messages: Messages, where: str) -> Messages:
    """The messages, if they begin and end with the assistant's turn."""
    if not messages:
        raise NotARow(f"{where} adds nothing to the prompt")
    for message in (messages[0], messages[-1]):
        if message.role != "assistant":
            raise NotARow(f"{where} must be the assistant's turn, not the {message.role}'s")
    return messages


def check_chat(messages: Messages, where: str) -> Messages:
    """The messages, if there is an assistant's turn to learn from."""
    if not any(message.role == "assistant" for message in messages):
        raise NotARow(f"{where} has no assistant turn")
    if len(messages) == 1:
        raise NotARow(f"{where} has no turn before the assistant's")
    return messages


def _message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise NotARow(f"{where} must be an object with `role` and `content`")
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    role = value.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise NotARow(f"{where}: unknown role {role!r}; the roles are {known}")
    if value.get("tool_calls"):
        raise NotARow(f"{where}: `tool_calls` are not supported; write the call as content")
    if content_key not in value:
        raise NotARow(f"{where} has no `{content_key}`")
    content = value[content_key]
    if isinstance(content, list):
        content = _joined_parts(content, where)
    return Message(_ROLES[role], _text(content, f"`{content_key}` of {where}"))


def _joined_parts(parts: list[object], where: str) -> str:
    """OpenAI's list of content parts, if all of them are text."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise NotARow(f"{where}: only text parts are supported")
        texts.append(part["text"])
    return "".join(texts)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise NotARow(f"{where} must be a text, not {kind}")
    if not value.strip():
        raise NotARow(f"{where} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair; UTF-8 cannot
        raise NotARow(f"{where} has half a surrogate pair at character {error.start + 1}") from None
    return value
