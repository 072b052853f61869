"""Preparing a dataset from source to disk: read, clean, split, balance, write, account for.

The stage program and `posttrain data prepare` both come here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from posttrain.data.balance import labels_of, left_out
from posttrain.data.cleaning import (
    SECONDS_BETWEEN_REPORTS,
    Cleaning,
    Every,
    OperationReport,
    Workers,
)
from posttrain.data.formats import read_rows
from posttrain.data.operations.base import CorpusOperation, Drop, RowOperation, Sketches
from posttrain.data.operations.exact_dedup import ExactDuplicates
from posttrain.data.operations.length import Length
from posttrain.data.operations.near_dedup import NearDuplicates
from posttrain.data.prepared import Counts, PreparedDataset
from posttrain.data.records import BadRecord
from posttrain.data.rows import Row
from posttrain.data.shards import TEST_ORIGIN, Shard, ShardWriter
from posttrain.data.split import SIDES, SplitResult, Splitter
from posttrain.data.writing import write_output
from posttrain.errors import DataError
from posttrain.recipe.base import RowFamily
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.prepare import PrepareConfig

if TYPE_CHECKING:
    pass

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
        cleaning = Cleaning(scratch, pool, events.phase)
        events.phase(f"reading {sources.shown}")
        with clock.phase("read and clean"):
            shards = _read(sources, writer, events)
            sketches = cleaning.apply(operations, shards, splitter)
        assert sketches is not None
        events.phase("splitting")
        with clock.phase("split"):
            test = TEST_ORIGIN if sources.test else None
            split = _split(splitter, cleaning, sketches, test)
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
        write_output(done, output)
    clock.seconds["write"] = round(clock.seconds["write"] - clock.seconds["ledger"], 3)
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
    often = Every(SECONDS_BETWEEN_REPORTS)
    for shard in writer.write(read_rows(sources.rows)):
        if often.due():
            events.phase(f"reading {sources.shown}: {writer.rows:,} rows")
        yield shard
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
        for batch in dataset.batches(side):
            yield from batch.rows


def _split(
    splitter: Splitter, cleaning: Cleaning, sketches: Sketches, test: str | None
) -> SplitResult:
    """The split; if too few rows are left for one, the error says what dropped the others."""
    try:
        return splitter.split(cleaning, sketches, test)
    except DataError as error:
        reasons: Counter[str] = Counter()
        for report in cleaning.reports:
            reasons.update(report.dropped)
        listed = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
        raise DataError(f"{error}{f'; dropped so far: {listed}' if listed else ''}") from error


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
