"""A prepared dataset on disk: what `prepare` writes and every later stage reads.

`dataset.json` holds family and counts, `train.parquet` the rows to train on in source order,
`held_out.parquet` the rows kept away from training ordered by content hash, and `ledger.parquet`
one line an input row: what became of it and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain.data.operations import Side
from posttrain.data.rows import Row, arrow_schema, content_digest, from_record, to_record
from posttrain.errors import DataError
from posttrain.recipe.base import RowFamily
from posttrain.store.files import write_json

if TYPE_CHECKING:
    import pyarrow as pa


class Counts(BaseModel):
    """Where the rows went. `rows_in` is the sum of all the others."""

    model_config = ConfigDict(frozen=True)

    rows_in: int
    train: int
    held_out: int
    bad: int
    dropped: dict[str, dict[str, int]]
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
    verdict: Literal["keep", "drop", "bad"]
    operation: str | None = None
    reason: str | None = None
    detail: str | None = None
    split: Side | None = None
    kept_id: str | None = None


class _Description(BaseModel):
    """What `dataset.json` holds."""

    family: RowFamily
    counts: Counts


@dataclass(frozen=True)
class PreparedDataset:
    """Reads a prepared dataset."""

    folder: Path
    family: RowFamily
    counts: Counts

    @classmethod
    def open(cls, folder: Path | str) -> PreparedDataset:
        """Open the folder that `prepare` wrote.

        Raises:
            DataError: it is no prepared dataset.
        """
        path = Path(folder) / "dataset.json"
        try:
            description = _Description.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise DataError(f"{folder}: not a prepared dataset: {error}") from error
        return cls(Path(folder), description.family, description.counts)

    def train(self, limit: int | None = None) -> list[Row]:
        """Rows to train on, in source order; the first `limit` of them."""
        return self._rows("train", limit)

    def held_out(self, limit: int | None = None) -> list[Row]:
        """Held-out rows ordered by content hash: `limit` rows are a random but stable sample."""
        return self._rows("held_out", limit)

    def ledger(self) -> list[LedgerLine]:
        """What became of every input row, in source order."""
        records = _read_records(self.folder / "ledger.parquet", None)
        return [LedgerLine(**record) for record in records]  # type: ignore[arg-type]

    def _rows(self, side: Side, limit: int | None) -> list[Row]:
        records = _read_records(self.folder / f"{side}.parquet", limit)
        return [from_record(self.family, record) for record in records]


def write_prepared(
    folder: Path,
    family: RowFamily,
    counts: Counts,
    train: Sequence[Row],
    held_out: Sequence[Row],
    ledger: Sequence[LedgerLine],
) -> None:
    """Write a prepared dataset; equal arguments give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = sorted(held_out, key=lambda row: (content_digest(row), row.id))
    schema = arrow_schema(family)
    _write_records(folder / "train.parquet", [to_record(row) for row in train], schema)
    _write_records(folder / "held_out.parquet", [to_record(row) for row in held_out], schema)
    lines = [asdict(line) for line in ledger]
    _write_records(folder / "ledger.parquet", lines, _ledger_schema())
    description = _Description(family=family, counts=counts)
    write_json(folder / "dataset.json", description.model_dump())


def _ledger_schema() -> pa.Schema:
    import pyarrow as pa

    types = {"row": pa.int64()}
    return pa.schema(
        [(field.name, types.get(field.name, pa.string())) for field in fields(LedgerLine)]
    )


def _write_records(path: Path, records: Sequence[Mapping[str, object]], schema: pa.Schema) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Set here, so that another version's default does not change the bytes.
    pq.write_table(
        pa.Table.from_pylist(list(records), schema=schema),
        path,
        compression="zstd",
        row_group_size=10_000,
        version="2.6",
    )


def _read_records(path: Path, limit: int | None) -> list[dict[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records: list[dict[str, object]] = []
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                records.extend(batch.to_pylist())
                if limit is not None and len(records) >= limit:
                    return records[:limit]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return records
