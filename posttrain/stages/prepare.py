"""`prepare`: rows in, a clean, split dataset and a ledger of every row out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.data.dedup import ExactDuplicates
from posttrain.data.formats import read_rows
from posttrain.data.length import Length
from posttrain.data.operations import Operation, Side
from posttrain.data.prepared import Counts, LedgerLine, write_prepared
from posttrain.data.records import BadRecord
from posttrain.data.rows import Row, family_of
from posttrain.data.sources import source_digest
from posttrain.data.split import split_rows
from posttrain.errors import DataError
from posttrain.events import EventWriter
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.prepare import PrepareConfig
from posttrain.stages.program import StageContext, StageInput, StageResult, run_program

_REPORT_EVERY = 10_000
"""Rows between two events while reading."""


def main(context: StageContext[PrepareConfig]) -> StageResult:
    """Read, split, clean and write; every input row is in the ledger.

    Raises:
        DataError: a source or a row cannot be used, or one side of the split ends up empty.
    """
    source = context.input("rows")
    spec = DatasetSpec.model_validate(source.spec)
    records = _read(spec, source.path, context.events)
    _check_unchanged(source, spec)
    context.events.phase("splitting and cleaning")
    rows = [record for record in records if not isinstance(record, BadRecord)]
    sides = split_rows(rows, context.config.held_out)
    cleaned = _clean(rows, sides, _operations(context.config))
    counts = cleaned.counts(rows_in=len(records), bad=len(records) - len(rows))
    _check_sides(counts)
    context.events.phase("writing")
    write_prepared(
        context.output,
        family_of(rows[0]),
        counts,
        train=cleaned.kept("train"),
        held_out=cleaned.kept("held_out"),
        ledger=[cleaned.ledger_line(record) for record in records],
    )
    return StageResult(metrics=_metrics(counts), headline=headline(counts))


def headline(counts: Counts) -> str:
    """`1,503 rows -> 1,341 train + 149 held out (13 dropped: 9 duplicate, 4 too long)`."""
    line = f"{counts.rows_in:,} rows -> {counts.train:,} train + {counts.held_out:,} held out"
    left_out = _left_out(counts)
    if not left_out:
        return line
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in left_out.items())
    return f"{line} ({sum(left_out.values()):,} dropped: {reasons})"


@dataclass
class _Cleaned:
    """Rows that are left after cleaning, and what became of the others."""

    rows: list[Row]
    sides: dict[str, Side]
    """Side of every row that could be read, by id."""
    dropped: dict[str, LedgerLine] = field(default_factory=dict)

    def ledger_line(self, record: Row | BadRecord) -> LedgerLine:
        if isinstance(record, BadRecord):
            where = (record.file, record.row)
            return LedgerLine("", *where, "bad", "read", reason="bad", detail=record.reason)
        kept = LedgerLine(record.id, record.file, record.row, "keep", split=self.sides[record.id])
        return self.dropped.get(record.id, kept)

    def kept(self, side: Side) -> list[Row]:
        return [row for row in self.rows if self.sides[row.id] == side]

    def counts(self, rows_in: int, bad: int) -> Counts:
        dropped: dict[str, Counter[str]] = {}
        for line in self.dropped.values():
            dropped.setdefault(str(line.operation), Counter())[str(line.reason)] += 1
        train, held_out = len(self.kept("train")), len(self.kept("held_out"))
        counts = Counts(
            rows_in=rows_in,
            train=train,
            held_out=held_out,
            bad=bad,
            dropped={name: dict(sorted(reasons.items())) for name, reasons in dropped.items()},
        )
        if counts.rows_in != train + held_out + bad + counts.rows_dropped:
            raise RuntimeError(f"prepare lost or invented rows: {counts}")
        return counts


def _operations(config: PrepareConfig) -> list[Operation]:
    """The cleaning steps in the order in which they run."""
    operations: list[Operation] = [Length(config.length)]
    if config.exact_dedup is not None:
        operations.append(ExactDuplicates(config.exact_dedup))
    return operations


def _read(spec: DatasetSpec, source: str, events: EventWriter) -> list[Row | BadRecord]:
    events.phase(f"reading {source}")
    records: list[Row | BadRecord] = []
    for record in read_rows(spec):
        records.append(record)
        if len(records) % _REPORT_EVERY == 0:
            events.phase(f"reading {source}: {len(records):,} rows")
    bad = [record for record in records if isinstance(record, BadRecord)]
    if len(bad) == len(records):
        example = f"; the first: {bad[0]}" if bad else ""
        raise DataError(f"{source}: no row can be used ({len(bad):,} bad ones{example})")
    if bad:
        events.warning(f"{len(bad):,} bad rows skipped, the first: {bad[0]}")
    events.progress(len(records), len(records), unit="row")
    return records


def _check_unchanged(source: StageInput, spec: DatasetSpec) -> None:
    """Refuse to publish rows of files that changed since the run was planned."""
    if source_digest(spec) != source.digest:
        raise DataError(f"{source.path}: changed since the run was planned; run it again")


def _clean(rows: list[Row], sides: Sequence[Side], operations: Sequence[Operation]) -> _Cleaned:
    cleaned = _Cleaned(rows, dict(zip((row.id for row in rows), sides, strict=True)))
    for operation in operations:
        kept: list[Row] = []
        for decision in operation.apply(cleaned.rows):
            row = decision.row
            if decision.reason is None:
                kept.append(row)
                continue
            cleaned.dropped[row.id] = LedgerLine(
                row.id,
                row.file,
                row.row,
                "drop",
                operation=operation.name,
                reason=decision.reason,
                detail=decision.detail,
                split=cleaned.sides[row.id],
                kept_id=decision.kept_id,
            )
        cleaned.rows = kept
    return cleaned


def _check_sides(counts: Counts) -> None:
    for name, number in (("training", counts.train), ("held-out", counts.held_out)):
        if number == 0:
            raise DataError(f"no {name} row is left: {headline(counts)}; loosen what drops them")


def _left_out(counts: Counts) -> dict[str, int]:
    """Rows that are on neither side, by reason."""
    left_out: Counter[str] = Counter()
    for reasons in counts.dropped.values():
        left_out.update(reasons)
    if counts.bad:
        left_out["bad"] = counts.bad
    return dict(left_out)


def _metrics(counts: Counts) -> dict[str, float]:
    metrics = {
        "rows_in": counts.rows_in,
        "rows_train": counts.train,
        "rows_held_out": counts.held_out,
    }
    left_out = {f"dropped_{reason.replace(' ', '_')}": n for reason, n in _left_out(counts).items()}
    return {key: float(value) for key, value in {**metrics, **left_out}.items()}


if __name__ == "__main__":
    run_program(PrepareConfig, main)
