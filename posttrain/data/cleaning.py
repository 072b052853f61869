"""Running operations over all rows: passes over shards, in worker processes.

Operations that decide on each row by itself run one after the other on a shard while it is in
memory. One that looks at all rows ends the pass: shards are sketched, the decision is made from
the sketches, and the next pass goes on with what is left. So a recipe's operations take one pass
more than there are deduplications, and memory holds a few shards and some bytes a row.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from posttrain.data.batch import RowBatch, row_text
from posttrain.data.operations.base import (
    CorpusDrops,
    CorpusOperation,
    Decisions,
    Drop,
    RowOperation,
    Sketcher,
)
from posttrain.data.rows import Row
from posttrain.data.shards import Shard, write_batch
from posttrain.data.words import hash_words
from posttrain.launch.parent import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")

SECONDS_BETWEEN_REPORTS = 5.0
EXAMPLE_CHARACTERS = 900
EXAMPLES_A_SHARD = 3
"""Rows a reason whose beginning is kept for the report, of each shard."""


class Every:
    """Says when it is time to report again."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = time.monotonic() + seconds

    def due(self) -> bool:
        """Whether the seconds have passed since the last time that they had."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


class Workers:
    """Processes that work on shards; none where there is one core or one shard."""

    def __init__(self, processes: int | None = None) -> None:
        """`processes` is one a usable core by default."""
        self._number = processes or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of the tasks; tasks are taken as fast as they come."""
        tasks = iter(tasks)
        head = list(itertools.islice(tasks, 2))
        if self._pool is None and (self._number == 1 or len(head) < 2):
            yield from map(function, itertools.chain(head, tasks))
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            # Whoever waits for work never learns that nobody is left to give any.
            self._pool = ProcessPoolExecutor(
                self._number,
                context,
                initializer=end_with_parent,
                initargs=(os.getpid(), signal.SIGKILL),
            )
        yield from self._pool.map(function, itertools.chain(head, tasks))


@dataclass
class OperationReport:
    """What one operation did."""

    name: str
    rows: int = 0
    """Rows that came to it."""
    dropped: Counter[str] = field(default_factory=Counter)
    edited: int = 0
    found: Counter[str] = field(default_factory=Counter)


@dataclass
class Fates:
    """What became of every row, a few bytes each."""

    size: int
    names: list[str] = field(default_factory=list)
    """Operations and reasons, by number."""

    def __post_init__(self) -> None:
        self.operation = np.full(self.size, -1, np.int16)
        """Number of the operation that dropped the row; -1 for rows that are left."""
        self.reason = np.full(self.size, -1, np.int16)
        self.kept = np.full(self.size, -1, np.int64)
        """For a duplicate: position of the row that stays in its place."""
        self.details: dict[int, str] = {}
        self.edits: dict[int, list[tuple[str, str]]] = {}
        """Changes to a row: operation and what it changed."""

    @property
    def alive(self) -> np.ndarray:
        """Mask of the rows that are left."""
        return self.operation < 0

    def drop(self, row: int, operation: str, drop: Drop, kept: int = -1) -> None:
        """Mark one row as dropped."""
        self.operation[row] = self.number(operation)
        self.reason[row] = self.number(drop.reason)
        self.kept[row] = kept
        if drop.detail is not None:
            self.details[row] = drop.detail

    def number(self, name: str) -> int:
        """The number that stands for a name."""
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)


@dataclass(frozen=True)
class RowExample:
    """The beginning of a row that an operation dropped or edited."""

    operation: str
    reason: str
    detail: str | None
    position: int
    text: str


@dataclass(frozen=True)
class _Task:
    """One shard in one pass."""

    shard: Shard
    alive: np.ndarray | None
    """Positions in the shard of the rows that are left; None for all."""
    operations: Sequence[RowOperation]
    sketchers: Sequence[Sketcher]
    folder: Path
    rewritten: Path
    """Where the shard goes if an operation edits rows."""
    count_words: bool


@dataclass(frozen=True)
class _Outcome:
    decisions: list[tuple[str, int, Decisions]]
    """Operation, rows that came to it, and decisions by position in the shard."""
    edited: bool
    words: np.ndarray | None
    examples: list[RowExample]


@dataclass
class Cleaning:
    """All rows and what has become of them so far. Implements `base.Corpus`."""

    folder: Path
    workers: Workers
    say: Callable[[str], None] = lambda _: None
    """Told how far a long pass is."""
    shards: list[Shard] = field(default_factory=list)
    reports: list[OperationReport] = field(default_factory=list)
    examples: list[RowExample] = field(default_factory=list)
    words: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Words of every row, as read."""

    def __post_init__(self) -> None:
        self.fates = Fates(0)
        self.foreign = np.zeros(0, bool)
        self._passes = 0

    def __len__(self) -> int:
        return self.fates.size

    def takes_part(self, others: Sequence[str]) -> np.ndarray:
        """Mask: rows not dropped so far, of this dataset and of the other ones named."""
        mask = self.fates.alive & ~self.foreign
        for shard in self.shards:
            if shard.origin in others:
                mask[shard.first : shard.first + shard.rows] = True
        return mask

    def batches(self) -> Iterator[tuple[int, RowBatch]]:
        """All batches in source order, each with the position of its first row."""
        for shard in self.shards:
            yield shard.first, shard.read()

    def apply(
        self,
        operations: Sequence[RowOperation | CorpusOperation],
        incoming: Iterable[Shard] | None = None,
        finally_sketch: Sketcher | None = None,
    ) -> SketchFiles | None:
        """Run operations in order.

        Args:
            operations: What to run.
            incoming: In the first call the shards, as they are written; the first pass works
                on them while later ones are still being read.
            finally_sketch: Sketched on the rows that are left, in the last pass.

        Returns:
            The sketches of `finally_sketch`.
        """
        for row_operations, corpus_operations in _passes(operations):
            sketchers: list[Sketcher] = [*corpus_operations]
            if not sketchers and finally_sketch is not None:
                sketchers = [finally_sketch]
            sketches = self._pass(row_operations, sketchers, incoming)
            incoming = None
            for operation in corpus_operations:
                self._decide(operation, sketches[operation.name])
        return sketches[finally_sketch.name] if finally_sketch else None

    def _pass(
        self,
        operations: Sequence[RowOperation],
        sketchers: Sequence[Sketcher],
        incoming: Iterable[Shard] | None,
    ) -> dict[str, SketchFiles]:
        """One pass over all shards."""
        self._passes += 1
        folder = self.folder / f"pass-{self._passes}"
        folder.mkdir(parents=True)
        shards: list[Shard] = []

        def tasks() -> Iterator[_Task]:
            for shard in self.shards if incoming is None else incoming:
                shards.append(shard)
                own = operations if shard.origin is None else ()
                alive = None if incoming is not None else self._alive_in(shard)
                rewritten = folder / shard.path.name
                yield _Task(shard, alive, own, sketchers, folder, rewritten, incoming is not None)

        outcomes: list[_Outcome] = []
        often = Every(SECONDS_BETWEEN_REPORTS)
        for outcome in self.workers.map(_work, tasks()):
            outcomes.append(outcome)
            if often.due():
                rows = sum(shard.rows for shard in shards[: len(outcomes)])
                total = sum(shard.rows for shard in shards)
                self.say(f"cleaning, pass {self._passes}: {rows:,} of {total:,} rows")
        if incoming is not None:
            self._begin(shards, outcomes)
        for number, outcome in enumerate(outcomes):
            self._absorb(shards[number], outcome)
            if outcome.edited:
                shards[number] = replace(shards[number], path=folder / shards[number].path.name)
        self.shards = shards
        alive = np.concatenate([s.first + self._alive_in(s) for s in shards])
        return {s.name: SketchFiles(folder, s.name, shards, alive) for s in sketchers}

    def _alive_in(self, shard: Shard) -> np.ndarray:
        return np.flatnonzero(self.fates.alive[shard.first : shard.first + shard.rows])

    def _begin(self, shards: Sequence[Shard], outcomes: Sequence[_Outcome]) -> None:
        """Now it is known how many rows there are."""
        size = sum(shard.rows for shard in shards)
        self.fates = Fates(size)
        self.foreign = np.zeros(size, bool)
        for shard in shards:
            foreign = shard.origin is not None
            self.foreign[shard.first : shard.first + shard.rows] = foreign
        self.words = np.concatenate([o.words for o in outcomes if o.words is not None])

    def _absorb(self, shard: Shard, outcome: _Outcome) -> None:
        for name, rows, decisions in outcome.decisions:
            report = self._report(name)
            report.rows += rows
            report.found.update(decisions.found)
            report.edited += len(decisions.edits)
            for position, drop in decisions.drops.items():
                self.fates.drop(shard.first + position, name, drop)
                report.dropped[drop.reason] += 1
            for position, edit in decisions.edits.items():
                changes = self.fates.edits.setdefault(shard.first + position, [])
                changes.append((name, edit.detail))
        self.examples += outcome.examples

    def _decide(self, operation: CorpusOperation, sketches: SketchFiles) -> None:
        report = self._report(operation.name)
        report.rows = int(self.takes_part(()).sum())
        self.record(operation.name, operation.decide(self, sketches), report)

    def record(self, name: str, drops: CorpusDrops, report: OperationReport) -> None:
        """Mark rows that were dropped by looking at all."""
        report.dropped[drops.reason] += len(drops.rows)
        report.found.update(drops.found)
        for number, row in enumerate(drops.rows):
            detail = drops.details[number] if drops.details else None
            self.fates.drop(int(row), name, Drop(drops.reason, detail), int(drops.kept[number]))

    def _report(self, name: str) -> OperationReport:
        for report in self.reports:
            if report.name == name:
                return report
        self.reports.append(OperationReport(name))
        return self.reports[-1]


class SketchFiles:
    """Sketches of one operation, a file a shard. Implements `base.Sketches`."""

    def __init__(self, folder: Path, name: str, shards: Sequence[Shard], rows: np.ndarray) -> None:
        self._paths = [_sketch_path(folder, name, shard) for shard in shards]
        self.rows = rows
        """Positions of the rows that were sketched, ascending."""

    def column(self, number: int) -> np.ndarray:
        """One column, a value a sketched row."""
        return np.concatenate([np.load(path, mmap_mode="r")[number] for path in self._paths])


def _passes(
    operations: Sequence[RowOperation | CorpusOperation],
) -> Iterator[tuple[list[RowOperation], list[CorpusOperation]]]:
    """Row operations followed by corpus operations, as often as they take turns; one at least.

    The last pass has no corpus operation: it is the one that sketches for the split.
    """
    row: list[RowOperation] = []
    corpus: list[CorpusOperation] = []
    for operation in operations:
        if isinstance(operation, CorpusOperation):
            corpus.append(operation)
            continue
        if corpus:
            yield row, corpus
            row, corpus = [], []
        row.append(operation)
    if corpus:
        yield row, corpus
        row = []
    yield row, []


def _work(task: _Task) -> _Outcome:
    """One shard in one pass; runs in a worker process."""
    batch = task.shard.read()
    words = hash_words(batch.arrow_texts).counts.astype(np.int32) if task.count_words else None
    alive = np.arange(len(batch)) if task.alive is None else task.alive
    done: list[tuple[str, int, Decisions]] = []
    examples: list[RowExample] = []
    edited = False
    for operation in task.operations:
        part = batch.take(alive)
        decisions = _at(alive, operation.apply(part))
        done.append((operation.name, len(alive), decisions))
        examples += _examples(operation.name, batch, decisions, task.shard.first)
        if decisions.edits:
            edited = True
            batch = batch.replace({p: edit.row for p, edit in decisions.edits.items() if edit.row})
            decisions.edits = {
                p: replace(e, row=None) for p, e in decisions.edits.items()
            }  # the row is in the shard; only the detail travels back
        if decisions.drops:
            alive = np.setdiff1d(alive, list(decisions.drops), assume_unique=True)
    if edited:
        write_batch(task.rewritten, batch)
    for sketcher in task.sketchers:
        sketch = sketcher.sketch(batch.take(alive))
        np.save(_sketch_path(task.folder, sketcher.name, task.shard), sketch)
    return _Outcome(done, edited, words, examples)


def _at(alive: np.ndarray, decisions: Decisions) -> Decisions:
    """Decisions about a part, by position in the whole shard."""
    return Decisions(
        {int(alive[p]): drop for p, drop in decisions.drops.items()},
        {int(alive[p]): edit for p, edit in decisions.edits.items()},
        decisions.found,
    )


def _examples(name: str, batch: RowBatch, decisions: Decisions, first: int) -> list[RowExample]:
    """Some rows of each reason: dropped ones as they were, edited ones as they are now."""
    shown: Counter[str] = Counter()
    examples = []
    changes: list[tuple[int, str, str | None, Row | None]]
    changes = [(p, d.reason, d.detail, None) for p, d in decisions.drops.items()]
    changes += [(p, "edited", e.detail, e.row) for p, e in decisions.edits.items()]
    for position, reason, detail, edited in changes:
        shown[reason] += 1
        if shown[reason] <= EXAMPLES_A_SHARD:
            text = row_text(edited) if edited is not None else batch.texts[position]
            shown_text = text[:EXAMPLE_CHARACTERS]
            examples.append(RowExample(name, reason, detail, first + position, shown_text))
    return examples


def _sketch_path(folder: Path, name: str, shard: Shard) -> Path:
    return folder / f"{name}-{shard.path.stem}.npy"
