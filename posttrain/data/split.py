"""The split into training and held-out rows, decided by content alone.

A row goes where the hash of its group says. The group is the first user turn, normalised and
without case (a document's text; a built-in row's subject), so the same prompt never stands on both
sides, a chat and a preference about one prompt stand on the same side, and adding rows moves none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from posttrain.data.operations import Side
from posttrain.data.rows import Row, all_messages
from posttrain.data.text import normalise
from posttrain.errors import DataError


def split_rows(rows: Sequence[Row], held_out: float) -> list[Side]:
    """The side of each row.

    Each side gets at least one group: should the hashes leave one side empty, which only happens
    to small datasets, the group nearest to it is moved over.

    Args:
        rows: Any number of rows.
        held_out: Expected share of groups to hold out, between 0 and 1.

    Returns:
        One side a row, in order.

    Raises:
        DataError: fewer than two different prompts, so that nothing can be held out.
    """
    positions = [_position(group_key(row)) for row in rows]
    lowest, highest = min(positions, default=0.0), max(positions, default=0.0)
    if lowest == highest:
        what = "all rows have the same prompt" if len(rows) > 1 else f"{len(rows)} row"
        raise DataError(
            f"cannot hold rows out for validation: {what}; training needs at least two rows with "
            "different prompts"
        )
    threshold = min(max(held_out, lowest), _before(highest, positions))
    return ["held_out" if position <= threshold else "train" for position in positions]


def group_key(row: Row) -> str:
    """What keeps rows together: rows of equal keys are never split."""
    if row.subject is not None:
        return f"subject\0{row.subject}"
    messages = all_messages(row)
    asked = next((message for message in messages if message.role == "user"), messages[0])
    return f"{asked.role}\0{normalise(asked.content, ignore_case=True)}"


def _position(key: str) -> float:
    """A place in [0, 1) that looks random but is the same for the same key, always."""
    return int.from_bytes(hashlib.sha256(f"split\0{key}".encode()).digest()[:6]) / 2**48


def _before(highest: float, positions: Sequence[float]) -> float:
    return max(position for position in positions if position < highest)
