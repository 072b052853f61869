"""Rows appended in order and read in any, in Arrow's columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

_SLAB_BYTES = 64 << 20
"""Rows held in one piece of memory; far below the 2 GiB that Arrow's text offsets can address."""


class Slabs:
    """All rows in memory, in pieces of one chunk each, so that taking some copies only those."""

    def __init__(self, slab_bytes: int = _SLAB_BYTES) -> None:
        self._slab_bytes = slab_bytes
        self._slabs: list[pa.Table] = []
        self._firsts: list[int] = []
        self._open: list[pa.Table] = []
        self._open_bytes = 0
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def append(self, table: pa.Table) -> None:
        """Add rows after those that are here."""
        self._open.append(table)
        self._open_bytes += table.nbytes
        self._rows += table.num_rows
        if self._open_bytes >= self._slab_bytes:
            self._close()

    def take(self, rows: np.ndarray) -> pa.Table:
        """These rows, in this order."""
        import pyarrow as pa

        self._close()
        slab = np.searchsorted(self._firsts, rows, side="right") - 1
        by_slab = np.argsort(slab, kind="stable")
        numbers, begins = np.unique(slab[by_slab], return_index=True)
        pieces = [
            self._slabs[number].take(rows[mine] - self._firsts[number])
            for number, mine in zip(numbers, np.split(by_slab, begins[1:]), strict=True)
        ]
        back = np.empty(len(rows), np.int64)
        back[by_slab] = np.arange(len(rows))
        return pa.concat_tables(pieces).combine_chunks().take(back)

    def _close(self) -> None:
        import pyarrow as pa

        if self._open:
            slab = pa.concat_tables(self._open).combine_chunks()
            self._firsts.append(self._rows - slab.num_rows)
            self._slabs.append(slab)
            self._open, self._open_bytes = [], 0
