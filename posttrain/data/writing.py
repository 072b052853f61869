"""Writing a prepared dataset: rows by side, a ledger of every row, counts that must add up."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.operations.base import Side
from posttrain.data.prepared import Counts, PreparedDataset, PreparedWriter, ledger_schema
from posttrain.data.records import BadRecord
from posttrain.data.shards import TEST_ORIGIN, Shard
from posttrain.data.split import SIDES

if TYPE_CHECKING:
    import pyarrow as pa

    from posttrain.data.preparation import Preparation


def write_output(done: Preparation, output: Path) -> None:
    """Write rows and ledger, count into `done`, and check that no row was lost or invented."""
    cleaning, alive = done.cleaning, done.alive
    ids = np.zeros(len(cleaning), "S16")
    place = np.full(len(cleaning), -1, np.int64)
    held: dict[str, list[np.ndarray]] = {"validation": [], "test": []}
    with PreparedWriter(output, done.family) as writer:
        for first, batch in cleaning.batches():
            span = slice(first, first + len(batch))
            ids[span] = batch.table.column("id").to_pylist()
            for number, side in enumerate(SIDES):
                mine = np.flatnonzero(alive[span] & (done.split.sides[span] == number))
                if not len(mine):
                    continue
                table = batch.table.take(mine)
                if side == "train":
                    place[first + mine] = writer.sizes["train"] + np.arange(len(mine))
                    writer.train(table)
                else:
                    writer.hold(side, table, done.split.text[first + mine])
                    held[side].append(first + mine)
        for side, places in writer.finish().items():
            if held[side]:
                place[np.concatenate(held[side])] = places
        begin = time.perf_counter()
        for table in _ledger(done, ids, place):
            writer.write_ledger(table)
        done.seconds["ledger"] = round(time.perf_counter() - begin, 3)
        done.counts = _count(done, writer.sizes)
    written = PreparedDataset.open(output)
    if sum(written.sizes.values()) != int(alive.sum()):
        raise RuntimeError(f"prepare lost or invented rows: {written.sizes}, {alive.sum()} left")


def _ledger(done: Preparation, ids: np.ndarray, place: np.ndarray) -> Iterator[pa.Table]:
    """Ledger lines in source order, a shard at a time."""
    import pyarrow as pa

    bad = iter([*done.bad, (len(done.cleaning) + 1, None)])
    before, record = next(bad)
    for shard in done.cleaning.shards:
        if shard.origin not in (None, TEST_ORIGIN):
            continue
        lines = _shard_lines(done, shard, ids, place)
        parts, begun = [], 0
        while record is not None and before <= shard.first + shard.rows:
            parts += [lines.slice(begun, before - shard.first - begun), _bad_line(record)]
            begun = before - shard.first
            before, record = next(bad)
        yield pa.concat_tables([*parts, lines.slice(begun)])


def _shard_lines(done: Preparation, shard: Shard, ids: np.ndarray, place: np.ndarray) -> pa.Table:
    import pyarrow as pa

    fates, span = done.cleaning.fates, slice(shard.first, shard.first + shard.rows)
    table = shard.read().table.select(["id", "file", "row"])
    dropped = fates.operation[span] >= 0
    operations: list[str | None] = _named(fates.names, fates.operation[span])
    reasons: list[str | None] = _named(fates.names, fates.reason[span])
    verdicts = np.where(dropped, "drop", "keep").tolist()
    details: list[str | None] = [None] * shard.rows
    for position in range(shard.rows):
        row = shard.first + position
        if row in fates.details:
            details[position] = fates.details[row]
        elif row in fates.edits and not dropped[position]:
            verdicts[position] = "edit"
            operations[position] = "; ".join(name for name, _ in fates.edits[row])
            details[position] = "; ".join(detail for _, detail in fates.edits[row])
    sides = np.array(SIDES)[done.split.sides[span]]
    kept = fates.kept[span]
    columns = {
        "id": table.column("id"),
        "file": table.column("file"),
        "row": table.column("row"),
        "verdict": verdicts,
        "operation": operations,
        "reason": reasons,
        "detail": details,
        "split": pa.array(sides, mask=dropped),
        "output": pa.array(place[span], mask=place[span] < 0),
        "kept_id": pa.array(ids[np.maximum(kept, 0)].astype(str), mask=kept < 0),
    }
    schema = ledger_schema()
    return pa.table(
        [
            pa.array(columns[name]) if isinstance(columns[name], list) else columns[name]
            for name in schema.names
        ],
        names=schema.names,
    ).cast(schema)


def _named(names: Sequence[str], numbers: np.ndarray) -> list[str | None]:
    known = np.array([*names, None], object)
    found: list[str | None] = known[numbers].tolist()
    return found


def _bad_line(record: BadRecord) -> pa.Table:
    import pyarrow as pa

    line = {
        "id": "",
        "file": record.file,
        "row": record.row,
        "verdict": "bad",
        "operation": "read",
        "reason": "bad",
        "detail": record.reason,
    }
    return pa.Table.from_pylist([line], schema=ledger_schema())


def _count(done: Preparation, sizes: Mapping[Side, int]) -> Counts:
    """Rows by fate, from the ledger's own numbers."""
    dropped: dict[str, dict[str, int]] = {}
    for report in done.cleaning.reports:
        reasons = {reason: n for reason, n in sorted(report.dropped.items()) if n}
        if reasons:
            dropped[report.name] = reasons
    counts = Counts(
        rows_in=int(done.origins.sum()) + len(done.bad),
        train=sizes["train"],
        validation=sizes["validation"],
        test=sizes["test"],
        bad=len(done.bad),
        dropped=dropped,
    )
    left = counts.train + counts.validation + counts.test
    if counts.rows_in != left + counts.bad + counts.rows_dropped:
        raise RuntimeError(f"prepare lost or invented rows: {counts}")
    return counts
