"""Reading sheets that people filled in, and what they say once the blinding is undone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import DataError
from posttrain.preferences.blinding import Choice, Vote, unblind
from posttrain.preferences.key import Key

_CHOICES: dict[str, Choice] = {"a": "A", "b": "B", "tie": "tie", "skip": "skip"}
_NEEDED = ("sheets", "item", "rater", "choice")
_LONGEST_CELL = 2**27
"""Characters; the csv module's own bound is 128 KiB."""
_SHOWN = 20
"""Problems that one report lists."""


@dataclass(frozen=True)
class Rating:
    """One rater's choice about one item."""

    rater: str
    item: str
    choice: Choice
    where: str
    """File and row, as a spreadsheet counts them."""


@dataclass(frozen=True)
class _Cells:
    """One filled row."""

    where: str
    sheets: str
    item: str
    rater: str
    choice: str


def read_ratings(paths: Sequence[Path], key: Key) -> list[Rating]:
    """The ratings in filled sheets, in any order; rows without a choice are not rated yet.

    Args:
        paths: CSV files: from a spreadsheet, with commas, semicolons or tabs, or from the page.
        key: Of the set that the sheets belong to.

    Raises:
        DataError: a file is no sheet; or rows are of another set, name an item that the rater was
            not given, have an unknown choice, or rate an item twice. All in one report.
    """
    problems: list[str] = []
    found: dict[tuple[str, str], Rating] = {}
    for path in paths:
        for cells in _read(path):
            choice = _CHOICES.get(cells.choice.lower())
            reason = _reason(cells, choice, key)
            twice = found.get((cells.rater, cells.item))
            if reason is None and twice is not None:
                reason = f"{cells.rater} rated {cells.item} already, in {twice.where}; keep one"
            if reason is not None:
                problems.append(f"{cells.where}: {reason}")
            elif choice is not None:
                rating = Rating(cells.rater, cells.item, choice, cells.where)
                found[cells.rater, cells.item] = rating
    if problems:
        more = len(problems) - _SHOWN
        listed = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise DataError("\n".join(listed))
    return list(found.values())


def votes_of(ratings: Sequence[Rating], key: Key) -> dict[str, dict[str, Vote]]:
    """Rater -> item -> what the rater said of the item's answers. Skipped items are left out."""
    votes: dict[str, dict[str, Vote]] = {}
    for rating in ratings:
        vote = unblind(rating.choice, key.orders[rating.rater][rating.item])
        if vote is not None:
            votes.setdefault(rating.rater, {})[rating.item] = vote
    return {rater: votes[rater] for rater in key.orders if rater in votes}


def _reason(cells: _Cells, choice: Choice | None, key: Key) -> str | None:
    """Why a row cannot be used."""
    if cells.sheets != key.sheets:
        return f"is of the sheets `{cells.sheets}`, and the key is of `{key.sheets}`"
    if cells.rater not in key.orders:
        return f"there is no rater `{cells.rater}`; the raters are {', '.join(key.orders)}"
    if cells.item not in key.items:
        return f"there is no item `{cells.item}` in these sheets"
    if cells.item not in key.orders[cells.rater]:
        return f"{cells.item} was not given to {cells.rater}"
    if choice is None:
        return f"the choice is `{cells.choice}`; write A, B, tie or skip, or leave it empty"
    return None


def _read(path: Path) -> Iterator[_Cells]:
    """Rows with a choice."""
    text = _text(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
    csv.field_size_limit(_LONGEST_CELL)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        missing = [column for column in _NEEDED if column not in header]
        if missing:
            raise DataError(
                f"{path}: is no filled sheet: it has no column {' and no '.join(missing)}"
            )
        for number, row in enumerate(reader, start=2):
            cells = {name: cell.strip() for name, cell in zip(header, row, strict=False)}
            # Spreadsheets may leave out empty cells at a row's end.
            if cells.get("choice"):
                needed = {name: cells.get(name, "") for name in _NEEDED}
                yield _Cells(where=f"{path}:{number}", **needed)
    except csv.Error as error:
        raise DataError(f"{path}: is no CSV that can be read: {error}") from error


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        # Excel saves plain `CSV` in the machine's own code page. What is read back is ASCII.
        return data.decode("latin-1")


def _delimiter(text: str) -> str:
    """Excel writes semicolons where the comma is the decimal mark, and tabs for `Unicode text`."""
    header = text.partition("\n")[0]
    return max(",;\t", key=header.count)
