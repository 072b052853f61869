"""Preparing a dataset from source to disk: read, clean, split, balance, write, account for.

The stage program and `posttrain data prepare` both come here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from posttrain.data.balance import labels_of, left_out
from posttrain.data.cleaning import Cleaning, OperationReport, Workers
from posttrain.data.formats import read_rows
from posttrain.data.operations.base import CorpusOperation, Drop, RowOperation, Side
from posttrain.data.operations.exact_dedup import ExactDuplicates
from posttrain.data.operations.length import Length
from posttrain.data.operations.near_dedup import NearDuplicates
from posttrain.data.prepared import Counts, PreparedDataset, PreparedWriter, ledger_schema
from posttrain.data.records import BadRecord
from posttrain.data.rows import Row
from posttrain.data.shards import Shard, ShardWriter
from posttrain.data.split import SIDES, SplitResult, Splitter
from posttrain.errors import DataError
from posttrain.recipe.base import RowFamily
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.prepare import PrepareConfig

if TYPE_CHECKING:
    import pyarrow as pa

TEST_ORIGIN = "test set"
_TRAIN = SIDES.index("train")


class Events(Protocol):
    """Who is told of the progress; `posttrain.events.EventWriter` is one."""

    def phase(self, message: str) -> None:
        """What is being done now."""

    def warning(self, message: str) -> None:
        """Something a person should know."""


@dataclass(frozen=True)
class Sources:
    """What a dataset is prepared from."""

    name: str
    rows: DatasetSpec
    shown: str
    """How the source is named in messages and in the report."""
    against: Mapping[str, Path] = field(default_factory=dict)
    """Folders of other prepared datasets, by name, for `against` of the deduplications."""
    test: DatasetSpec | None = None
    """The test set, if the user gave one."""
    tokenizer: Path | None = None
    """Folder of the model, for `length.max_tokens`."""
    contamination: Path | None = None
    """Index of the evaluation's items, for `decontaminate`; None where there are none."""


@dataclass
class Preparation:
    """Everything known when a dataset has been written."""

    sources: Sources
    config: PrepareConfig
    family: RowFamily
    counts: Counts
    cleaning: Cleaning
    split: SplitResult
    near: NearDuplicates | None
    bad: list[tuple[int, BadRecord]]
    origins: np.ndarray
    """Mask: rows that came from the dataset or its test set, so that the ledger has them."""
    labels: dict[str, dict[str, int]]
    seconds: dict[str, float]

    @property
    def alive(self) -> np.ndarray:
        """Mask of the rows that were written."""
        return np.asarray(self.cleaning.fates.alive & self.origins)


def prepare_dataset(
    sources: Sources,
    config: PrepareConfig,
    output: Path,
    scratch: Path,
    events: Events,
    processes: int | None = None,
) -> Preparation:
    """Prepare a dataset.

    Args:
        sources: What to read.
        config: What to do with it.
        output: Folder to write; see `posttrain.data.prepared`.
        scratch: Folder for intermediate files, as large as the source.
        events: Told of the progress.
        processes: Worker processes; one a usable core by default. The result is the same.

    Raises:
        DataError: a source or a row cannot be used, or one side of the split ends up empty.
    """
    clock = _Clock()
    writer = ShardWriter(scratch / "rows")
    writer.folder.mkdir(parents=True)
    operations, near = build_operations(config, sources)
    splitter = Splitter(config.split)
    with Workers(processes) as pool:
        cleaning = Cleaning(scratch, pool)
        events.phase(f"reading {sources.shown}")
        with clock.phase("read and clean"):
            shards = _read(sources, writer, events)
            sketches = cleaning.apply(operations, shards, splitter)
        assert sketches is not None
        events.phase("splitting")
        with clock.phase("split"):
            test = TEST_ORIGIN if sources.test else None
            split = splitter.split(cleaning, sketches, test)
            report = OperationReport("split", rows=int(cleaning.takes_part(()).sum()))
            cleaning.record("split", split.drops, report)
            if len(split.drops.rows):
                cleaning.reports.append(report)
    assert writer.family is not None
    origins = np.zeros(len(cleaning), bool)
    for shard in cleaning.shards:
        if shard.origin in (None, TEST_ORIGIN):
            origins[shard.first : shard.first + shard.rows] = True
    labels = _balance(cleaning, split, config) if config.balance else {}
    events.phase("writing")
    done = Preparation(
        sources,
        config,
        writer.family,
        Counts(rows_in=0, train=0, validation=0),
        cleaning,
        split,
        near,
        writer.bad,
        origins,
        labels,
        clock.seconds,
    )
    with clock.phase("write"):
        _write(done, output)
    _check_sides(done.counts)
    return done


def build_operations(
    config: PrepareConfig, sources: Sources
) -> tuple[list[RowOperation | CorpusOperation], NearDuplicates | None]:
    """The operations that are switched on, in order; and the near deduplication among them."""
    near = NearDuplicates(config.near_dedup) if config.near_dedup else None
    made: dict[str, RowOperation | CorpusOperation | None] = {
        "length": Length(config.length, sources.tokenizer) if config.length else None,
        "exact_dedup": ExactDuplicates(config.exact_dedup) if config.exact_dedup else None,
        "near_dedup": near,
    }
    if config.document_quality:
        from posttrain.data.operations.document_quality import DocumentQualityFilter

        made["document_quality"] = DocumentQualityFilter(config.document_quality)
    if config.answer_quality:
        from posttrain.data.operations.answer_quality import AnswerQualityFilter

        made["answer_quality"] = AnswerQualityFilter(config.answer_quality)
    if config.language:
        from posttrain.data.operations.language import LanguageFilter

        made["language"] = LanguageFilter(config.language)
    if config.pii:
        from posttrain.data.operations.pii import PiiFilter

        made["pii"] = PiiFilter(config.pii)
    if config.decontaminate and sources.contamination:
        from posttrain.data.operations.decontaminate import DecontaminationFilter

        made["decontaminate"] = DecontaminationFilter(
            sources.contamination, config.decontaminate.ngram, config.decontaminate.short_ngram
        )
    ordered = [operation for name in config.order if (operation := made.get(name)) is not None]
    return ordered, near


def _read(sources: Sources, writer: ShardWriter, events: Events) -> Iterator[Shard]:
    """All shards: those of other datasets first, so that their rows come before ours."""
    for name, folder in sources.against.items():
        yield from writer.write(_all_rows(folder), origin=name)
    if sources.test is not None:
        yield from writer.write(read_rows(sources.test), origin=TEST_ORIGIN)
    before = writer.rows
    yield from writer.write(read_rows(sources.rows))
    if writer.rows == before:
        example = f"; the first: {writer.bad[0][1]}" if writer.bad else ""
        raise DataError(
            f"{sources.shown}: no row can be used ({len(writer.bad):,} bad ones{example})"
        )
    if writer.bad:
        events.warning(f"{len(writer.bad):,} bad rows skipped, the first: {writer.bad[0][1]}")


def _all_rows(folder: Path) -> Iterable[Row]:
    dataset = PreparedDataset.open(folder)
    for side in SIDES:
        yield from dataset.rows(side)


def _balance(
    cleaning: Cleaning, split: SplitResult, config: PrepareConfig
) -> dict[str, dict[str, int]]:
    """Leave training rows out; returns the labels before and after."""
    assert config.balance is not None
    trains = cleaning.takes_part(()) & (split.sides == _TRAIN)
    labels: list[str | None] = []
    for first, batch in cleaning.batches():
        mine = np.flatnonzero(trains[first : first + len(batch)])
        if len(mine):
            labels += labels_of(batch.take(mine), config.balance)
    rows = np.flatnonzero(trains)
    goes, before, after = left_out(labels, split.text[rows], config.balance)
    report = OperationReport("balance", rows=len(rows))
    for row, label in zip(rows[goes], np.array(labels, object)[goes], strict=True):
        detail = f"{before[label]:,} rows of `{str(label)[:60]}`, {after[label]:,} stay"
        cleaning.fates.drop(int(row), "balance", Drop("balanced away", detail))
        report.dropped["balanced away"] += 1
    cleaning.reports.append(report)
    return {
        "before": dict(before.most_common(30)),
        "after": {k: after[k] for k, _ in before.most_common(30)},
    }


def _write(done: Preparation, output: Path) -> None:
    """Write rows and ledger, count, and check that no row was lost or invented."""
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
        for table in _ledger(done, ids, place):
            writer.write_ledger(table)
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


def _check_sides(counts: Counts) -> None:
    for name, number in (("training", counts.train), ("validation", counts.validation)):
        if number == 0:
            raise DataError(f"no {name} row is left: {headline(counts)}; loosen what drops them")


def headline(counts: Counts) -> str:
    """`1,503 rows -> 1,341 train + 149 validation (13 dropped: 9 duplicate, 4 too long)`."""
    sides = [f"{counts.train:,} train", f"{counts.validation:,} validation"]
    if counts.test:
        sides.append(f"{counts.test:,} test")
    line = f"{counts.rows_in:,} rows -> {' + '.join(sides)}"
    reasons = left_out_by_reason(counts)
    if not reasons:
        return line
    listed = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
    return f"{line} ({sum(reasons.values()):,} dropped: {listed})"


def left_out_by_reason(counts: Counts) -> Counter[str]:
    """Rows that are on no side, by reason."""
    reasons: Counter[str] = Counter()
    for of_operation in counts.dropped.values():
        reasons.update(of_operation)
    if counts.bad:
        reasons["bad"] = counts.bad
    return reasons


@dataclass
class _Clock:
    """Wall-clock seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 3)
