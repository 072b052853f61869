"""Exact deduplication: of rows that say the same, the first in source order stays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from posttrain.data.operations import Decision
from posttrain.data.rows import KtoExample, Row, all_messages
from posttrain.data.text import normalise
from posttrain.recipe.prepare import ExactDedup


class ExactDuplicates:
    """Drops a row whose normalised text was seen before, on either side of the split.

    Holds 16 bytes and an id a distinct row. Who says what counts: equal words in other roles, or
    another KTO label, are another row.
    """

    name = "exact_dedup"

    def __init__(self, config: ExactDedup) -> None:
        self._ignore_case = config.ignore_case

    def apply(self, rows: Iterable[Row]) -> Iterator[Decision]:
        """One decision a row; see `posttrain.data.operations`."""
        first: dict[bytes, str] = {}
        for row in rows:
            key = self._key(row)
            if key in first:
                yield Decision(row, reason="duplicate", kept_id=first[key])
            else:
                first[key] = row.id
                yield Decision(row)

    def _key(self, row: Row) -> bytes:
        digest = hashlib.sha256()
        for message in all_messages(row):
            text = normalise(message.content, ignore_case=self._ignore_case)
            digest.update(f"{message.role}\0{text}\0".encode())
        if isinstance(row, KtoExample):
            digest.update(str(row.label).encode())
        return digest.digest()[:16]
