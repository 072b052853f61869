"""The canonical rows: what every format becomes and every training method reads.

Four families, one frozen dataclass each:

    documents     Document     text
    chats         Chat         messages
    preferences   Preference   prompt, chosen, rejected, maybe margin
    kto           KtoExample   prompt, completion, label

A row knows where it came from (`file` and `row`), so that an error, a ledger line or a model's
lineage can point at it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import orjson

from posttrain.recipe.base import RowFamily

if TYPE_CHECKING:
    import pyarrow as pa

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


Messages: TypeAlias = tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class _Row:
    id: str
    """16 hex digits over content, file and position: the row's name in ledgers and lineage."""
    file: str
    """File or source it came from, relative to what all files of the source have in common."""
    row: int
    """Line of the file, or number of the record in it, counted from 1."""
    subject: str | None = None
    """What the row is about, where the source knows: for built-in rows a Python object's name."""
    category: str | None = None
    """Label that classes can be balanced by, where the source has such a column."""
    date: str | None = None
    """When it was written, in a form whose order as text is its order in time (ISO 8601)."""
    score: float | None = None
    """How good it is, where the source says so; more is better."""


@dataclass(frozen=True, kw_only=True)
class Document(_Row):
    """Running text, all of it trained on."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Chat(_Row):
    """A conversation; the assistant's turns are trained on."""

    messages: Messages


@dataclass(frozen=True, kw_only=True)
class Preference(_Row):
    """Two continuations of one prompt, the first better than the second."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None
    """How much better the first is, at least 0, where the source says so: a reward model's scores
    shall be so far apart. No part of what the row says: pairs that differ in it alone are equal."""


@dataclass(frozen=True, kw_only=True)
class KtoExample(_Row):
    """One continuation of a prompt, marked as wanted or unwanted."""

    prompt: Messages
    completion: Messages
    label: bool


Row: TypeAlias = Document | Chat | Preference | KtoExample

ROW_TYPES: dict[RowFamily, type[Row]] = {
    "documents": Document,
    "chats": Chat,
    "preferences": Preference,
    "kto": KtoExample,
}


def family_of(row: Row) -> RowFamily:
    """The family a row belongs to."""
    return next(family for family, row_type in ROW_TYPES.items() if type(row) is row_type)


def all_messages(row: Row) -> Messages:
    """Every turn of a row, in reading order; a document is one assistant turn."""
    match row:
        case Document():
            return (Message("assistant", row.text),)
        case Chat():
            return row.messages
        case Preference():
            return row.prompt + row.chosen + row.rejected
        case KtoExample():
            return row.prompt + row.completion


def wanted_text(row: Row) -> Document | Chat:
    """The row as something to be read: of a pair the chosen answer, of a marked one its answer."""
    match row:
        case Preference():
            messages = row.prompt + row.chosen
        case KtoExample():
            messages = row.prompt + row.completion
        case _:
            return row
    return Chat(id=row.id, file=row.file, row=row.row, messages=messages)


def content_json(row: Row) -> str:
    """What the row says, without where it came from, as canonical JSON."""
    return canonical_json({name: getattr(row, name) for name in _CONTENT[type(row)]})


def canonical_json(content: Mapping[str, str | bool | Messages]) -> str:
    """JSON with sorted keys, no white space and no escapes but those that JSON demands."""
    plain = {
        key: value if isinstance(value, str | bool) else plain_messages(value)
        for key, value in content.items()
    }
    return orjson.dumps(plain, option=orjson.OPT_SORT_KEYS).decode()


def content_digest(row: Row) -> str:
    """SHA-256 over what the row says; equal for equal content wherever it stands."""
    return hashlib.sha256(content_json(row).encode()).hexdigest()


def row_id(content: str, file: str, row: int) -> str:
    """A row's stable id: 16 hex digits of SHA-256 over content, file name and position."""
    return hashlib.sha256(f"{content}\0{file}\0{row}".encode()).hexdigest()[:16]


def to_record(row: Row) -> dict[str, object]:
    """A row as plain values, in the order of `arrow_schema`."""
    record: dict[str, object] = {
        "id": row.id,
        "file": row.file,
        "row": row.row,
        "subject": row.subject,
        "category": row.category,
        "date": row.date,
        "score": row.score,
    }
    for name in _CONTENT[type(row)]:
        value = getattr(row, name)
        record[name] = value if isinstance(value, str | bool) else plain_messages(value)
    if isinstance(row, Preference):
        record["margin"] = row.margin
    return record


def from_record(family: RowFamily, record: Mapping[str, object]) -> Row:
    """The row that `to_record` made plain."""
    values = {
        key: _messages(value) if isinstance(value, list) else value for key, value in record.items()
    }
    return ROW_TYPES[family](**values)  # type: ignore[arg-type]


def arrow_schema(family: RowFamily) -> pa.Schema:
    """Columns of a prepared dataset's Parquet files."""
    import pyarrow as pa

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    content = {
        "documents": [("text", pa.string())],
        "chats": [("messages", messages)],
        "preferences": [
            ("prompt", messages),
            ("chosen", messages),
            ("rejected", messages),
            ("margin", pa.float64()),
        ],
        "kto": [("prompt", messages), ("completion", messages), ("label", pa.bool_())],
    }
    origin = [
        ("id", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("subject", pa.string()),
        ("category", pa.string()),
        ("date", pa.string()),
        ("score", pa.float64()),
    ]
    return pa.schema(origin + content[family])


_CONTENT: dict[type[Row], tuple[str, ...]] = {
    Document: ("text",),
    Chat: ("messages",),
    Preference: ("prompt", "chosen", "rejected"),
    KtoExample: ("prompt", "completion", "label"),
}
"""What a row says, as opposed to where it came from."""


def plain_messages(messages: Messages) -> list[dict[str, str]]:
    """Turns as plain values."""
    return [{"role": message.role, "content": message.content} for message in messages]


def _messages(values: Sequence[Mapping[str, str]]) -> Messages:
    return tuple(Message(value["role"], value["content"]) for value in values)  # type: ignore[arg-type]
