"""Raw records: what a source gives before anyone knows the format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class RawRecord:
    """One record as it stands in its file: column names and values of any type."""

    file: str
    row: int
    """Line of the file, or number of the record in it, counted from 1."""
    fields: Mapping[str, object]
    subject: str | None = None


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used, and why."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        """The reason where an editor can jump to it: `tickets.jsonl:17: `output` is empty`."""
        return f"{self.file}:{self.row}: {self.reason}"


Records: TypeAlias = Iterator[RawRecord | BadRecord]


def not_utf8(error: UnicodeDecodeError) -> str:
    """Why bytes are no text, with the position in their line."""
    position = error.start - error.object.rfind(b"\n", 0, error.start)
    byte = error.object[error.start]
    return f"not valid UTF-8 at byte {position} of the line (0x{byte:02x}); save the file as UTF-8"
