"""A prepared dataset on disk: what `prepare` and `mix` write and every later stage reads.

`dataset.json` holds family and counts; `train.parquet` the rows to train on; `validation.parquet`
and `test.parquet` the rows kept away from training, ordered by content; `ledger.parquet` one line
an input row: what became of it and why. `report.html` and `report.json` show it to people. A mix
has `validation-origins.parquet` and `test-origins.parquet` as well: the dataset of each row.

What later stages compute depends on the first four alone. Ledger and report are left out of the
artifact's digest: another evaluation set that drops no row changes the report but no training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain.data.batch import RowBatch
from posttrain.data.operations.base import Side
from posttrain.data.rows import Row, arrow_schema, content_digest
from posttrain.data.split import SIDES
from posttrain.errors import DataError
from posttrain.recipe.base import RowFamily
from posttrain.store.files import write_json

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Verdict = Literal["keep", "edit", "drop", "bad"]


class Counts(BaseModel):
    """Where the rows went. `rows_in` is the sum of all the others."""

    model_config = ConfigDict(frozen=True)

    rows_in: int
    train: int
    validation: int
    test: int = 0
    bad: int = 0
    dropped: dict[str, dict[str, int]] = {}
    """Rows dropped, by operation and reason."""

    @property
    def rows_dropped(self) -> int:
        """Rows that an operation dropped; bad rows are not among them."""
        return sum(sum(reasons.values()) for reasons in self.dropped.values())


@dataclass(frozen=True)
class LedgerLine:
    """What became of one input row."""

    id: str
    """The row's id; empty for a bad row, which never became one."""
    file: str
    row: int
    verdict: Verdict
    operation: str | None = None
    """What dropped or edited it."""
    reason: str | None = None
    detail: str | None = None
    split: Side | None = None
    """Side of a row that stays."""
    output: int | None = None
    """Its position in that side's file, from 0."""
    kept_id: str | None = None
    """For a duplicate: id of the row that stays in its place."""


class _Description(BaseModel):
    """What `dataset.json` holds."""

    family: RowFamily
    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class PreparedDataset:
    """Reads a prepared dataset."""

    folder: Path
    family: RowFamily
    sizes: dict[Side, int]

    @classmethod
    def open(cls, folder: Path | str) -> PreparedDataset:
        """Open the folder that `prepare` or `mix` wrote.

        Raises:
            DataError: it is no prepared dataset.
        """
        path = Path(folder) / "dataset.json"
        try:
            found = _Description.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise DataError(f"{folder}: not a prepared dataset: {error}") from error
        sizes: dict[Side, int] = {
            "train": found.train,
            "validation": found.validation,
            "test": found.test,
        }
        return cls(Path(folder), found.family, sizes)

    def train(self, limit: int | None = None) -> list[Row]:
        """Rows to train on, in order; the first `limit` of them."""
        return self.rows("train", limit)

    def validation(self, limit: int | None = None) -> list[Row]:
        """Validation rows ordered by content: `limit` rows are a random but stable sample."""
        return self.rows("validation", limit)

    def test(self, limit: int | None = None) -> list[Row]:
        """Test rows, ordered like the validation rows."""
        return self.rows("test", limit)

    def unseen(self, limit: int | None = None) -> list[Row]:
        """What a finished model is measured on: the test rows, or without any the validation's."""
        return self.rows("test" if self.sizes["test"] else "validation", limit)

    def rows(self, side: Side, limit: int | None = None) -> list[Row]:
        """The first `limit` rows of one side."""
        rows: list[Row] = []
        for batch in self.batches(side):
            rows += batch.rows
            if limit is not None and len(rows) >= limit:
                return rows[:limit]
        return rows

    def batches(self, side: Side) -> Iterator[RowBatch]:
        """One side as operations see rows, a thousand at a time."""
        import pyarrow as pa

        for batch in read_batches(self.folder / f"{side}.parquet"):
            yield RowBatch(self.family, pa.Table.from_batches([batch]))

    def origins(self, side: Side) -> list[str] | None:
        """Of a mix: the dataset that each row of a held-out side comes from; None of others."""
        import pyarrow.parquet as pq

        path = self.folder / f"{side}-origins.parquet"
        if not path.exists():
            return None
        names: list[str] = pq.read_table(path).column("dataset").to_pylist()
        return names

    def ledger(self) -> list[LedgerLine]:
        """What became of every input row, in source order."""
        lines = []
        for batch in read_batches(self.folder / "ledger.parquet"):
            lines += [LedgerLine(**record) for record in batch.to_pylist()]
        return lines


class PreparedWriter:
    """Writes a prepared dataset row by row; equal input gives equal bytes."""

    def __init__(self, folder: Path, family: RowFamily) -> None:
        self._folder = folder
        self._family = family
        self._schema = arrow_schema(family)
        self._held: dict[Side, list[tuple[pa.Table, np.ndarray]]] = {"validation": [], "test": []}
        self._writers: dict[str, pq.ParquetWriter] = {}
        self.sizes: dict[Side, int] = dict.fromkeys(SIDES, 0)

    def __enter__(self) -> PreparedWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()

    def train(self, table: pa.Table) -> None:
        """Append training rows."""
        self._writer("train", self._schema).write_table(table)
        self.sizes["train"] += table.num_rows

    def hold(self, side: Side, table: pa.Table, order: np.ndarray) -> None:
        """Keep rows for validation or test; `order` is a number a row to sort by in the end."""
        self._held[side].append((table, order))
        self.sizes[side] += table.num_rows

    def write_origins(self, side: Side, names: Sequence[str]) -> None:
        """Leave the dataset that each row of a held-out side comes from, in the side's order."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"dataset": pa.array(names, pa.string())})
        pq.write_table(table, self._folder / f"{side}-origins.parquet", compression="zstd")

    def write_ledger(self, table: pa.Table) -> None:
        """Append ledger lines; after `finish`, which says where rows went."""
        self._writer("ledger", ledger_schema()).write_table(table)

    def finish(self) -> dict[Side, np.ndarray]:
        """Write what is held and the description.

        Returns:
            For validation and test: for each held row, in the order in which it came, its
            position in the file.
        """
        import pyarrow as pa

        places: dict[Side, np.ndarray] = {}
        for side, parts in self._held.items():
            table = pa.concat_tables([self._schema.empty_table(), *(part for part, _ in parts)])
            order = np.concatenate([np.zeros(0, np.uint64), *(order for _, order in parts)])
            ids = np.array(table.column("id").to_pylist(), "S16")
            first = np.lexsort((ids, order))
            self._writer(side, self._schema).write_table(table.take(first), 10_000)
            places[side] = np.empty(len(first), np.int64)
            places[side][first] = np.arange(len(first))
        self._writer("train", self._schema)
        self._writer("ledger", ledger_schema())
        description = _Description(family=self._family, **self.sizes)
        write_json(self._folder / "dataset.json", description.model_dump())
        return places

    def _writer(self, name: str, schema: pa.Schema) -> pq.ParquetWriter:
        import pyarrow.parquet as pq

        if name not in self._writers:
            # Set here, so that another version's default does not change the bytes.
            self._writers[name] = pq.ParquetWriter(
                self._folder / f"{name}.parquet", schema, compression="zstd", version="2.6"
            )
        return self._writers[name]


def ledger_schema() -> pa.Schema:
    """Columns of a ledger."""
    import pyarrow as pa

    numbers = {"row", "output"}
    return pa.schema(
        [(f.name, pa.int64() if f.name in numbers else pa.string()) for f in fields(LedgerLine)]
    )


def read_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """A Parquet file in batches.

    Raises:
        DataError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(1024, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def write_dataset(folder: Path, family: RowFamily, rows: Mapping[Side, Sequence[Row]]) -> None:
    """Write rows that are at hand as a prepared dataset, in order of content off training."""
    with PreparedWriter(folder, family) as writer:
        for side, own in rows.items():
            if not own:
                continue
            table = RowBatch.of(family, list(own)).table
            if side == "train":
                writer.train(table)
            else:
                order = [int(content_digest(row)[:16], 16) for row in own]
                writer.hold(side, table, np.array(order, np.uint64))
        writer.finish()
