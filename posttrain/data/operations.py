"""The contract of everything that cleans rows: a decision for each row, in order.

An operation sees rows of both sides of the split, in source order, and says of each whether it
stays, stays changed, or is dropped and why. It may look at all rows before its first decision
(clusters of near duplicates need that) but never loses, adds or reorders one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from posttrain.data.rows import Row

Side = Literal["train", "held_out"]


@dataclass(frozen=True)
class Decision:
    """What an operation decided about one row."""

    row: Row
    """The row, as the operation leaves it. An edit keeps its id."""
    reason: str | None = None
    """Why it is dropped, as a short category that can be counted; None keeps it."""
    detail: str | None = None
    """The numbers behind the reason."""
    kept_id: str | None = None
    """For a duplicate: id of the row that stays in its place."""


class Operation(Protocol):
    """One cleaning step."""

    name: str
    """Name in the ledger, and key in the recipe."""

    def apply(self, rows: Iterable[Row]) -> Iterator[Decision]:
        """One decision a row, in the order of the rows."""
        ...
