"""Rows on disk between two passes: Arrow files of a few thousand rows each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.data.batch import RowBatch, row_text
from posttrain.data.records import BadRecord
from posttrain.data.rows import Row, family_of
from posttrain.errors import DataError
from posttrain.recipe.base import RowFamily

TEST_ORIGIN = "test set"
"""Origin of rows that the user gave as the test set: compared with and written, never dropped."""
SHARD_ROWS = 5_000
SHARD_CHARACTERS = 8_000_000
"""A shard ends when it has that many rows or characters: memory is bounded for long rows, too."""


@dataclass(frozen=True)
class Shard:
    """Consecutive rows in a file."""

    path: Path
    first: int
    """Position of its first row among all rows."""
    rows: int
    family: RowFamily
    origin: str | None = None
    """Name of the other dataset that the rows come from; None for the one being prepared."""

    def read(self) -> RowBatch:
        """All its rows."""
        import pyarrow as pa

        with pa.OSFile(str(self.path)) as file:
            return RowBatch(self.family, pa.ipc.open_file(file).read_all())


@dataclass
class ShardWriter:
    """Writes rows to shards, and remembers those that cannot be used."""

    folder: Path
    family: RowFamily | None = None
    """Known with the first row; all rows must be of it."""
    shards: list[Shard] = field(default_factory=list)
    bad: list[tuple[int, BadRecord]] = field(default_factory=list)
    """Unusable records, each with the number of rows before it."""
    rows: int = 0

    def write(
        self, records: Iterable[Row | BadRecord], origin: str | None = None
    ) -> Iterator[Shard]:
        """Write records, and give each shard once it is on disk.

        Raises:
            DataError: rows of another family than those written before.
        """
        pending: list[Row] = []
        characters = 0
        for record in records:
            if isinstance(record, BadRecord):
                self.bad.append((self.rows + len(pending), record))
                continue
            pending.append(record)
            characters += len(row_text(record))
            if len(pending) == SHARD_ROWS or characters >= SHARD_CHARACTERS:
                yield self._flush(pending, origin)
                pending, characters = [], 0
        if pending:
            yield self._flush(pending, origin)

    def _flush(self, rows: list[Row], origin: str | None) -> Shard:
        family = family_of(rows[0])
        if self.family not in (None, family):
            raise DataError(
                f"{rows[0].file}: holds {family}, but the dataset to prepare holds {self.family}"
            )
        self.family = family
        path = self.folder / f"{len(self.shards):06}.arrow"
        write_batch(path, RowBatch.of(family, rows))
        shard = Shard(path, self.rows, len(rows), family, origin)
        self.shards.append(shard)
        self.rows += len(rows)
        return shard


def write_batch(path: Path, batch: RowBatch) -> None:
    """Write a batch to an Arrow file."""
    import pyarrow as pa

    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, batch.table.schema, options=options) as writer,
    ):
        writer.write_table(batch.table)
