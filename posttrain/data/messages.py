"""Reading one field of a record: a text, a label, a list of messages, a date.

Every function raises `NotARow` with a reason that names the field. Values are shown cut short,
since a broken file can hold anything.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
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


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


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


def parse_category(value: object) -> str | None:
    """A label: a text, a whole number, or true or false; None for null or a blank text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if value is None or isinstance(value, str):
        return _stripped(value, "`category`")
    raise NotARow(f"`category` must be a text or a whole number, not {shown(value)}")


def parse_score(value: object) -> float | None:
    """A finite number, also as text; None for null or a blank text."""
    return _number(value, "`score`")


def parse_margin(value: object) -> float | None:
    """A finite number of at least 0, also as text; None for null or a blank text."""
    margin = _number(value, "`margin`")
    if margin is not None and margin < 0:
        raise NotARow(
            f"`margin` must be at least 0, not {shown(value)}: it is how much better `chosen` is"
        )
    return margin


def parse_date(value: object) -> str | None:
    """A date as ISO 8601 text in UTC, without a zone; None for null or a blank text.

    ISO 8601 text with a time, dates and times become `2024-05-01T12:00:00`; without a zone they
    are taken to be UTC. Any other text stays as it is. A whole number is a year (2024), a day
    (20240501), or the time since 1970 in seconds, milli-, micro- or nanoseconds, told apart by
    the number of digits.
    """
    if value is None or isinstance(value, str):
        text = _stripped(value, "`date`")
        return text if text is None or len(text) <= len("2024-05-01") else _iso_text(text)
    try:
        if isinstance(value, datetime):
            return _utc(value)
        if isinstance(value, date):
            return value.isoformat()
        if isinstance(value, int) and not isinstance(value, bool):
            return _date_of_number(value)
        if isinstance(value, float) and value.is_integer():  # pandas' whole numbers beside nulls
            return _date_of_number(int(value))
    except (ValueError, OverflowError):
        pass
    raise NotARow(f"`date` must be a date as text, such as 2024-05-01, not {shown(value)}")


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
    if isinstance(value, dict):
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


def shown(value: object) -> str:
    """A value for an error message, cut short."""
    return _SHORT.repr(value)


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise NotARow(f"{where} must be an object with `role` and `content`")
    # A Parquet column may have both pairs of fields, one of them null.
    role_key, content_key = ("role", "content")
    if value.get("from") is not None:
        role_key, content_key = ("from", "value")
    role = value.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise NotARow(f"{where}: unknown role {shown(role)}; the roles are {known}")
    if value.get("tool_calls"):
        raise NotARow(f"{where}: `tool_calls` are not supported; write the call as content")
    if content_key not in value:
        raise NotARow(f"{where} has no `{content_key}`")
    content = value[content_key]
    if isinstance(content, list):
        content = _joined_parts(content, where)
    return Message(_ROLES[role], _text(content, f"`{content_key}` of {where}"))


def _number(value: object, where: str) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, int | float | str | Decimal) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise NotARow(f"{where} must be a number, not {shown(value)}")


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
    if not value or value.isspace():
        raise NotARow(f"{where} is empty")
    return _encodable(value, where)


def _encodable(value: str, where: str) -> str:
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair; UTF-8 cannot
        raise NotARow(f"{where} has half a surrogate pair at character {error.start + 1}") from None
    return value


def _stripped(value: str | None, where: str) -> str | None:
    """A text without the white space around it; None if nothing is left. CSV knows no null."""
    stripped = value.strip() if value else ""
    return _encodable(stripped, where) if stripped else None


def _iso_text(text: str) -> str:
    try:
        return _utc(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        return text


def _utc(time: datetime) -> str:
    if time.tzinfo is not None:
        time = time.astimezone(UTC).replace(tzinfo=None)
    return time.isoformat()


def _date_of_number(value: int) -> str:
    """Raises ValueError or OverflowError if the number is no date."""
    if 1 <= value <= 9999:
        return f"{value:04}"
    if 1000_01_01 <= value <= 9999_12_31:
        return date(value // 10_000, value // 100 % 100, value % 100).isoformat()
    for digits, per_second in ((11, 1), (14, 10**3), (17, 10**6), (20, 10**9)):
        # 10**8 seconds are in 1973; anything smaller is no time anyone would store.
        if 10 ** (digits - 3) <= value < 10**digits:
            return _utc(_EPOCH + timedelta(microseconds=value * 10**6 // per_second))
    raise ValueError(value)
