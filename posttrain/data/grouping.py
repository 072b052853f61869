"""Which rows share a key: by sorting in memory, or by DuckDB beyond a memory cap."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

MEMORY_CAP = 2**30
"""Bytes that grouping one column of keys may take; keys, rows and order need 24 a row."""
_CHUNK = 1_000_000


@dataclass(frozen=True)
class Groups:
    """Rows that share a key with another row."""

    rows: np.ndarray
    """int64, ordered by group and within a group ascending."""
    starts: np.ndarray
    """int64, where each group begins in `rows`, and the number of rows at the end."""

    @property
    def sizes(self) -> np.ndarray:
        """Rows a group; at least 2."""
        return np.diff(self.starts)

    def __iter__(self) -> Iterator[np.ndarray]:
        for first, last in zip(self.starts[:-1], self.starts[1:], strict=True):
            yield self.rows[first:last]


def group_equal(keys: np.ndarray, rows: np.ndarray, memory_cap: int = MEMORY_CAP) -> Groups:
    """Groups of at least two rows with equal keys.

    Args:
        keys: uint64, one a row; may be memory-mapped.
        rows: int64, the row each key belongs to, ascending.
        memory_cap: Bytes; where sorting needs more, DuckDB does it on disk.
    """
    if 24 * len(keys) > memory_cap:
        return _group_on_disk(keys, rows, memory_cap)
    # numpy's fastest sort is not stable; the few rows that share a key are put in order below.
    order = np.argsort(keys)
    return _groups(keys[order], rows[order])


def _groups(keys: np.ndarray, rows: np.ndarray) -> Groups:
    """Groups among rows that are sorted by key."""
    if not len(keys):
        return Groups(np.zeros(0, np.int64), np.zeros(1, np.int64))
    same = keys[1:] == keys[:-1]
    shared = np.zeros(len(keys), bool)
    shared[1:] |= same
    shared[:-1] |= same
    first = np.ones(len(keys), bool)
    first[1:] = ~same
    starts = np.append(np.flatnonzero(first[shared]), shared.sum())
    members = rows[shared]
    group = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return Groups(members[np.lexsort((members, group))], starts)


def _group_on_disk(keys: np.ndarray, rows: np.ndarray, memory_cap: int) -> Groups:
    import duckdb
    import pyarrow as pa

    schema = pa.schema([("key", pa.uint64()), ("row", pa.int64())])
    with tempfile.TemporaryDirectory(prefix="posttrain-grouping-") as folder:
        connection = duckdb.connect(str(Path(folder) / "keys.duckdb"))
        connection.execute(f"SET memory_limit = '{max(memory_cap, 2**27)}B'")
        connection.execute("SET threads = 1; SET preserve_insertion_order = false")
        connection.execute(f"SET temp_directory = '{folder}'")
        table = pa.RecordBatchReader.from_batches(schema, _chunks(keys, rows, schema))
        connection.register("source", table)
        connection.execute("CREATE TABLE keys AS SELECT * FROM source")
        shared = connection.execute(
            "SELECT key, row FROM keys WHERE key IN "
            "(SELECT key FROM keys GROUP BY key HAVING count(*) > 1) ORDER BY key, row"
        ).fetchnumpy()
        connection.close()
    return _groups(shared["key"], shared["row"])


def _chunks(keys: np.ndarray, rows: np.ndarray, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    for first in range(0, len(keys), _CHUNK):
        part = slice(first, first + _CHUNK)
        yield pa.record_batch([np.asarray(keys[part]), np.asarray(rows[part])], schema=schema)
