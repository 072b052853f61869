"""Raw records: what a source gives before anyone knows the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
