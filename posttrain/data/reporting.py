"""From a finished preparation to what its report shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.advice import (
    DatasetFacts,
    Diversity,
    Method,
    first_words,
    opening,
    sufficiency,
)
from posttrain.data.batch import RowBatch
from posttrain.data.cleaning import EXAMPLE_CHARACTERS, RowExample
from posttrain.data.preparation import Preparation
from posttrain.data.report_data import (
    Cluster,
    Example,
    FunnelStep,
    Histogram,
    Hit,
    ReportData,
    SideSummary,
)
from posttrain.data.rows import KtoExample, Preference
from posttrain.data.shards import TEST_ORIGIN
from posttrain.data.similar import components
from posttrain.data.split import SIDES
from posttrain.data.words import hash_words

if TYPE_CHECKING:
    pass

EXAMPLES = 5
"""Rows shown for each reason."""
CLUSTERS = 12
CLUSTER_MEMBERS = 4
"""Clusters shown, and dropped rows shown of each."""
OPENINGS = 50_000
"""Training rows whose beginnings are counted; beyond that the figure no longer moves."""
_EDGES = (0, 5, 7, *(round(10 * 2 ** (step / 2)) for step in range(21)))
"""Words, in steps of half a doubling."""
_FILES = 20


def report_of(done: Preparation, methods: tuple[Method, ...] = ()) -> ReportData:
    """Everything that the report of a preparation shows.

    Args:
        done: A dataset that was written.
        methods: What the recipe trains on it with; empty if that is not known.
    """
    shown = _Shown(done)
    shown.read()
    alive = np.flatnonzero(done.alive)
    side_of = done.split.sides[alive]
    words = shown.words[alive]
    return ReportData(
        dataset=done.sources.name,
        source=done.sources.shown,
        family=done.family,
        rows_in=done.counts.rows_in,
        sides=tuple(
            SideSummary(
                side=side, rows=int((side_of == n).sum()), words=int(words[side_of == n].sum())
            )
            for n, side in enumerate(SIDES)
            if side != "test" or (side_of == n).any()
        ),
        funnel=_funnel(done),
        files=dict(shown.files.most_common(_FILES)),
        lengths_before=_histogram(done.cleaning.words[done.origins]),
        lengths_after=_histogram(words),
        examples=shown.examples(),
        clusters=shown.clusters(),
        cluster_sizes=shown.cluster_sizes,
        labels=done.labels or shown.label_table(),
        languages=_found(done, "language"),
        contamination=_hits(done, shown),
        preference_lengths=shown.preference_lengths(),
        advice=sufficiency(_facts(done, shown, methods)),
        leak_check=done.split.checked,
        seconds=done.seconds,
    )


@dataclass
class _Shown:
    """What must be read from the rows again: texts to show, words, beginnings, labels."""

    done: Preparation
    files: Counter[str] = field(default_factory=Counter)
    openings: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    pair_words: list[tuple[int, int]] = field(default_factory=list)
    """Words of `chosen` and `rejected`, of training pairs."""
    texts: dict[int, tuple[str, str, int, str]] = field(default_factory=dict)
    """Id, file, row and beginning of the rows that are shown, by position."""

    def __post_init__(self) -> None:
        self.words = self.done.cleaning.words.copy()
        self._of_operations = _pick(self.done.cleaning.examples)
        self._of_deduplication = self._duplicates_to_show()
        self._clusters = self._clusters_to_show()

    def read(self) -> None:
        """One pass over all shards."""
        wanted = {example.position for example in self._of_operations}
        wanted |= {row for pair in self._of_deduplication for row in pair}
        wanted |= {row for kept, rows, _ in self._clusters for row in (kept, *rows)}
        positions = np.array(sorted(wanted), np.int64)
        edited = np.array(sorted(self.done.cleaning.fates.edits), np.int64)
        for shard in self.done.cleaning.shards:
            own = shard.origin in (None, TEST_ORIGIN)
            begin, end = np.searchsorted(positions, [shard.first, shard.first + shard.rows])
            if not own and begin == end:
                continue
            batch = shard.read()
            for position in positions[begin:end]:
                self._remember(int(position), batch, int(position) - shard.first)
            if own:
                self.files.update(batch.table.column("file").to_pylist())
                self._count(shard.first, batch, edited)

    def _remember(self, position: int, batch: RowBatch, at: int) -> None:
        record = batch.table.select(["id", "file", "row"]).slice(at, 1).to_pylist()[0]
        text = batch.texts[at][:EXAMPLE_CHARACTERS]
        self.texts[position] = (record["id"], record["file"], record["row"], text)

    def _count(self, first: int, batch: RowBatch, edited: np.ndarray) -> None:
        """Words of edited rows, and how training rows begin."""
        begin, end = np.searchsorted(edited, [first, first + len(batch)])
        if begin < end:
            changed = edited[begin:end]
            texts = [batch.texts[row - first] for row in changed]
            self.words[changed] = hash_words(texts).counts
        span = slice(first, first + len(batch))
        trains = self.done.alive[span] & (self.done.split.sides[span] == SIDES.index("train"))
        rows = np.flatnonzero(trains)
        self.labels.update(
            label for label in batch.table.column("category").take(rows).to_pylist() if label
        )
        if self.openings.total() >= OPENINGS:
            rows = rows[:0]
        part = batch.take(rows)
        if batch.family == "documents":
            self.openings.update(first_words(text) for text in part.texts)
            return
        self.openings.update(opening(row) for row in part.rows)
        for row in part.rows:
            if isinstance(row, KtoExample):
                self.labels[f"label {str(row.label).lower()}"] += 1
            elif isinstance(row, Preference):
                chosen = " ".join(m.content for m in row.chosen if m.role == "assistant")
                rejected = " ".join(m.content for m in row.rejected if m.role == "assistant")
                self.pair_words.append((len(chosen.split()), len(rejected.split())))

    def examples(self) -> tuple[Example, ...]:
        """A few rows of every reason."""
        found = [
            self._example(e.position, e.operation, e.reason, e.detail, e.text)
            for e in self._of_operations
        ]
        fates = self.done.cleaning.fates
        for row, _ in self._of_deduplication:
            operation = fates.names[fates.operation[row]]
            reason = fates.names[fates.reason[row]]
            found.append(self._example(row, operation, reason, fates.details.get(row)))
        return tuple(found)

    def clusters(self) -> tuple[Cluster, ...]:
        """The largest clusters of near duplicates, those of differing text first."""
        fates = self.done.cleaning.fates
        return tuple(
            Cluster(
                size=size,
                kept=self._example(kept, "near_dedup", "kept", None),
                dropped=tuple(
                    self._example(row, "near_dedup", "near duplicate", fates.details.get(row))
                    for row in rows
                ),
            )
            for kept, rows, size in self._clusters
        )

    def label_table(self) -> dict[str, dict[str, int]]:
        """Labels of the training rows, where they have some."""
        return {"after": dict(self.labels.most_common(30))} if self.labels else {}

    def preference_lengths(self) -> dict[str, float]:
        """Length bias: a reward model may learn that longer is better."""
        if not self.pair_words:
            return {}
        chosen, rejected = np.array(self.pair_words).T
        unequal = chosen != rejected
        return {
            "chosen": float(chosen.mean()),
            "rejected": float(rejected.mean()),
            "chosen_longer": float((chosen > rejected)[unequal].mean()) if unequal.any() else 0.5,
        }

    def _example(
        self, row: int, operation: str, reason: str, detail: str | None, text: str | None = None
    ) -> Example:
        row_id, file, number, now = self.texts[row]
        shown = self._without_pii(now if text is None else text)
        return Example(
            operation=operation,
            reason=reason,
            detail=detail,
            file=file,
            row=number,
            id=row_id,
            text=shown,
        )

    def _without_pii(self, text: str) -> str:
        """A report is passed around: what `pii` looks for must not stand in it."""
        config = self.done.config.pii
        if config is None:
            return text
        from posttrain.data.operations.pii import finders_of, scrub

        return scrub(text, finders_of(config))[0]

    def _duplicates_to_show(self) -> list[tuple[int, int]]:
        """Rows dropped by looking at all rows, with the row that stays, a few a reason."""
        fates = self.done.cleaning.fates
        shown: Counter[int] = Counter()
        found = []
        for row in np.flatnonzero(fates.kept >= 0):
            shown[int(fates.reason[row])] += 1
            if shown[int(fates.reason[row])] <= EXAMPLES:
                found.append((int(row), int(fates.kept[row])))
        return found

    def _clusters_to_show(self) -> list[tuple[int, list[int], int]]:
        """Kept row, some dropped rows and size of the largest clusters."""
        self.cluster_sizes: dict[int, int] = {}
        near, fates = self.done.near, self.done.cleaning.fates
        if near is None or near.pairs is None or not len(near.pairs):
            return []
        members = np.unique(np.concatenate([near.pairs.left, near.pairs.right]))
        cluster = components(near.pairs, len(fates.operation))[members]
        _, sizes = np.unique(cluster, return_counts=True)
        self.cluster_sizes = {
            int(k): int(v) for k, v in zip(*np.unique(sizes, return_counts=True), strict=True)
        }
        number = fates.names.index("near_dedup") if "near_dedup" in fates.names else -2
        dropped = np.flatnonzero(fates.operation == number)
        kept, counts = np.unique(fates.kept[dropped], return_counts=True)
        largest = kept[np.argsort(-counts, kind="stable")][:CLUSTERS]
        return [
            (
                int(row),
                [int(r) for r in dropped[fates.kept[dropped] == row][:CLUSTER_MEMBERS]],
                int(counts[kept == row][0]) + 1,
            )
            for row in largest
        ]


def _pick(examples: Sequence[RowExample]) -> list[RowExample]:
    """The first few of every reason."""
    shown: Counter[tuple[str, str]] = Counter()
    picked = []
    for example in examples:
        shown[example.operation, example.reason] += 1
        if shown[example.operation, example.reason] <= EXAMPLES:
            picked.append(example)
    return picked


def _funnel(done: Preparation) -> tuple[FunnelStep, ...]:
    read = FunnelStep(
        operation="read",
        rows=done.counts.rows_in,
        dropped={"bad": done.counts.bad} if done.counts.bad else {},
    )
    return (
        read,
        *(
            FunnelStep(
                operation=report.name,
                rows=report.rows,
                dropped={reason: n for reason, n in report.dropped.most_common() if n},
                edited=report.edited,
                found=dict(report.found.most_common(30)),
            )
            for report in done.cleaning.reports
        ),
    )


def _found(done: Preparation, operation: str) -> dict[str, int]:
    return {
        name: number
        for report in done.cleaning.reports
        if report.name == operation
        for name, number in report.found.most_common(15)
    }


def _hits(done: Preparation, shown: _Shown) -> tuple[Hit, ...]:
    examples = [e for e in shown.examples() if e.operation == "decontaminate"]
    found = []
    for report in done.cleaning.reports:
        if report.name != "decontaminate":
            continue
        for reason, rows in report.dropped.items():
            first = next((e.detail for e in examples if e.reason == reason), None)
            benchmark = reason.removeprefix("in ")
            found.append(Hit(benchmark=benchmark, rows=rows, example=first or ""))
    return tuple(found)


def _histogram(words: np.ndarray) -> Histogram:
    """Words a row, in bins of half a doubling."""
    counts, _ = np.histogram(words, [*_EDGES, np.inf])
    return Histogram(
        edges=(*_EDGES, float(max(_EDGES[-1] + 1, words.max(initial=0)))),
        counts=tuple(int(count) for count in counts),
        mean=float(words.mean()) if len(words) else 0.0,
        median=float(np.median(words)) if len(words) else 0.0,
        p95=float(np.percentile(words, 95)) if len(words) else 0.0,
    )


def _facts(done: Preparation, shown: _Shown, methods: tuple[Method, ...]) -> DatasetFacts:
    counts, lengths = done.counts, shown.preference_lengths()
    train = done.alive & (done.split.sides == SIDES.index("train"))
    return DatasetFacts(
        family=done.family,
        rows=counts.train,
        words=int(shown.words[train].sum()),
        validation_rows=counts.validation,
        methods=methods,
        exact_duplicates=_share(done, "exact_dedup"),
        near_duplicates=_share(done, "near_dedup"),
        diversity=Diversity.of(shown.openings),
        chosen_words=lengths.get("chosen"),
        rejected_words=lengths.get("rejected"),
        chosen_longer=lengths.get("chosen_longer"),
        wanted=shown.labels.get("label true", 0) if done.family == "kto" else None,
        unwanted=shown.labels.get("label false", 0) if done.family == "kto" else None,
        labels=done.labels.get("after", {}) if done.labels else {},
    )


def _share(done: Preparation, operation: str) -> float | None:
    """Share of the rows read that an operation dropped; None if it did not run."""
    for report in done.cleaning.reports:
        if report.name == operation:
            return report.dropped.total() / done.counts.rows_in
    return None
