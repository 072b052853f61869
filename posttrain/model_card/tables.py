"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int | None = None
) -> Iterator[str]:
    """The lines of a table.

    Args:
        heads: Of the columns.
        rows: Their cells.
        numbers_from: First of the columns that are set to the right; None for none.
    """
    right = len(heads) if numbers_from is None else numbers_from
    yield f"| {' | '.join(heads)} |"
    yield f"|{'|'.join('---:' if at >= right else '---' for at in range(len(heads)))}|"
    for row in rows:
        yield f"| {' | '.join(map(cell, row))} |"


def cell(text: str) -> str:
    """A text that does not end its cell."""
    return " ".join(text.replace("|", "\\|").split())
