"""CSV: a header line, then a record a line, or more lines where a quoted cell holds line ends.

The dialect is Excel's and RFC 4180's: commas, and double quotes that are doubled inside a cell.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator

from posttrain.data.records import BadRecord, RawRecord, Records, not_utf8
from posttrain.errors import DataError

_LONGEST = 2**27
"""Bytes of a record. A quote that is never closed swallows no more than this."""


def csv_records(lines: Iterator[bytes], name: str) -> Records:
    """Records of a CSV file, each with the line at which it begins.

    After a record that is not valid CSV, such as one with a quote that is never closed, reading
    goes on with the line after its first. What is left of its other lines is bad too, if its
    quotes or the number of its cells show it; a line of it that looks like a record is taken for
    one.

    Args:
        lines: The file's lines, with their ends, without a byte order mark.
        name: What the records say they come from.

    Raises:
        DataError: the header cannot be read or names a column twice, or quotes are missing
            throughout.
    """
    # The csv module's own bound is 128 KiB; answers are longer.
    csv.field_size_limit(_LONGEST)
    records = _CsvRecords(lines, name)
    header = _header(records, name)
    for cells in records:
        if isinstance(cells, BadRecord):
            yield cells
        elif len(cells) != len(header):
            if not records.quotes_add_up(cells):
                records.give_back()
            yield records.bad(f"{len(cells)} cells where the header has {len(header)}")
        elif records.torn and not records.quotes_add_up(cells):
            yield records.bad("the rest of a record that is not valid CSV")
        else:
            records.torn = False
            yield RawRecord(name, records.start, dict(zip(header, cells, strict=True)))


def _header(records: _CsvRecords, name: str) -> list[str]:
    header = next(records, [])
    if isinstance(header, BadRecord):
        raise DataError(f"{header}; this is the header, without which no row can be read")
    double = next((cell for cell in header if cell and header.count(cell) > 1), None)
    if double is not None:
        raise DataError(f"{name}: two columns are called `{double}`; rename one")
    return header


class _CsvRecords:
    """The cells of one record after the other, blank lines left out."""

    start = 0
    """Line at which the present record begins."""
    torn = False
    """Whether the present lines may be the rest of a record that is not valid CSV."""

    def __init__(self, lines: Iterator[bytes], name: str) -> None:
        self._lines = enumerate(lines, start=1)
        self._name = name
        self._again: deque[tuple[int, bytes]] = deque()
        """Lines that a broken record took with it, to be read again."""
        self._taken: list[tuple[int, bytes]] = []
        """Lines of the present record."""
        self._bytes_taken = self._bytes_read = self._bytes_again = 0
        self._not_text: UnicodeDecodeError | None = None
        self._reader = csv.reader(self._feed(), strict=True)

    def __iter__(self) -> Iterator[list[str] | BadRecord]:
        return self

    def __next__(self) -> list[str] | BadRecord:
        while True:
            self._bytes_taken = 0
            self._taken.clear()
            self._not_text = None
            try:
                cells = next(self._reader)
            except csv.Error as error:
                self.start = self._taken[0][0]
                self.give_back()
                return self.bad(f"not valid CSV: {error}")
            self.start, line = self._taken[0]
            if self._not_text is not None:
                return self.bad(not_utf8(self._not_text))
            if not line.isspace():
                return cells

    def bad(self, reason: str) -> BadRecord:
        """The present record, as one that cannot be used."""
        return BadRecord(self._name, self.start, reason)

    def quotes_add_up(self, cells: list[str]) -> bool:
        """Whether every cell that needs quotes has two, and every quote in a cell is doubled."""
        needed = sum(
            2 + 2 * cell.count('"') for cell in cells if '"' in cell or "," in cell or "\n" in cell
        )
        return needed <= sum(line.count(b'"') for _, line in self._taken)

    def give_back(self) -> None:
        """Have all lines of the present record but the first read again.

        Raises:
            DataError: lines are read again and again, because each opens what the next one closes.
        """
        self.torn = True
        self._bytes_again += self._bytes_taken
        if self._bytes_again > 10 * self._bytes_read + 2**20:
            raise DataError(
                f"{self._name}:{self.start}: too many quotes are missing to tell one record from "
                "the next"
            )
        self._again.extendleft(reversed(self._taken[1:]))
        self._reader = csv.reader(self._feed(), strict=True)

    def _feed(self) -> Iterator[str]:
        """Lines as text; one that is no UTF-8 too, or its quotes would be lost."""
        while item := self._again.popleft() if self._again else self._next_line():
            self._taken.append(item)
            line = item[1]
            self._bytes_taken += len(line)
            if self._bytes_taken > _LONGEST and len(self._taken) > 1:
                raise csv.Error(f"no end in {_LONGEST:,} bytes")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                self._not_text = error
                text = line.decode(errors="replace")
            yield text[:-2] + "\n" if text.endswith("\r\n") else text

    def _next_line(self) -> tuple[int, bytes] | None:
        item = next(self._lines, None)
        self._bytes_read += len(item[1]) if item else 0
        return item
