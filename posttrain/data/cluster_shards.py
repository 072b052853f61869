"""Shards of a corpus, JSON Lines or Parquet: reading their texts, and copying them without rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.lines import Lines
from posttrain.errors import DataError
from posttrain.store.files import temporary_beside

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BATCH_ROWS = 8192


def read_texts(path: Path, column: str) -> Iterator[pa.Array]:
    """The texts of a shard in order, some thousands at a time.

    Lines of nothing but white space are no rows.

    Raises:
        DataError: the file cannot be read, or a row has no text.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path, column)
        return
    for lines in Lines.read([path]):
        yield lines.texts(column)


def copy_rows(path: Path, out: Path, dropped: np.ndarray) -> int:
    """Copy a shard, leaving rows out; the copy appears when it is complete.

    JSON Lines are copied byte for byte, but for lines of white space, which are left out, and a
    missing line feed at the end, which is added. Parquet keeps schema, metadata, row groups and
    compression.

    Args:
        path: The shard.
        out: Its copy.
        dropped: Positions of the rows to leave out, ascending.

    Returns:
        Rows of the shard, those left out among them.
    """
    with temporary_beside(out) as temporary:
        if path.suffix == ".parquet":
            return _copy_parquet(path, temporary, dropped)
        return _copy_lines(path, temporary, dropped)


def _read_parquet(path: Path, column: str) -> Iterator[pa.Array]:
    import pyarrow as pa

    with _open_parquet(path) as file:
        kind = file.schema_arrow.field(column).type if column in file.schema_arrow.names else None
        if kind not in (pa.string(), pa.large_string()):
            found = ", ".join(file.schema_arrow.names)
            raise DataError(f"{path}: no text column `{column}`; its columns: {found}")
        for batch in file.iter_batches(_BATCH_ROWS, columns=[column]):
            if batch.column(0).null_count:
                raise DataError(f"{path}: a row has no text in column `{column}`; fill or drop it")
            yield batch.column(0)


def _open_parquet(path: Path) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def _copy_lines(path: Path, out: Path, dropped: np.ndarray) -> int:
    first = 0
    with out.open("wb") as file:
        for lines in Lines.read([path]):
            lines.copy(file, _stays(first, len(lines), dropped))
            first += len(lines)
    return first


def _copy_parquet(path: Path, out: Path, dropped: np.ndarray) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    with _open_parquet(path) as file:
        codec = "none"
        if file.num_row_groups and file.metadata.num_columns:
            codec = file.metadata.row_group(0).column(0).compression.lower()
        codec = "none" if codec == "uncompressed" else codec
        with pq.ParquetWriter(out, file.schema_arrow, compression=codec) as writer:
            for number in range(file.num_row_groups):
                group = file.read_row_group(number)
                stays = _stays(first, len(group), dropped)
                if stays.any():
                    writer.write_table(group.filter(pa.array(stays)))
                first += len(group)
    return first


def _stays(first: int, rows: int, dropped: np.ndarray) -> np.ndarray:
    begin, end = np.searchsorted(dropped, [first, first + rows])
    stays = np.ones(rows, bool)
    stays[dropped[begin:end] - first] = False
    return stays
