"""Rows, batches and corpora in memory, for the tests of operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from posttrain.data.batch import RowBatch
from posttrain.data.cleaning import Cleaning, Workers
from posttrain.data.operations.base import CorpusDrops, CorpusOperation, Decisions, RowOperation
from posttrain.data.rows import Chat, Document, Message, Row, family_of
from posttrain.data.shards import ShardWriter


def document(number: int, text: str, **fields: object) -> Document:
    return Document(id=f"{number:016}", file="a", row=number, text=text, **fields)  # type: ignore[arg-type]


def documents(texts: Sequence[str]) -> list[Row]:
    return [document(number, text) for number, text in enumerate(texts)]


def chat(number: int, prompt: str, answer: str, subject: str | None = None) -> Chat:
    messages = (Message("user", prompt), Message("assistant", answer))
    return Chat(id=f"{number:016}", file="a", row=number, messages=messages, subject=subject)


def batch_of(rows: Sequence[Row]) -> RowBatch:
    return RowBatch.of(family_of(rows[0]) if rows else "documents", list(rows))


def decide(operation: RowOperation, rows: Sequence[Row]) -> Decisions:
    return operation.apply(batch_of(rows))


class MemoryCorpus:
    """Implements `posttrain.data.operations.base.Corpus` over a few batches."""

    def __init__(self, batches: Sequence[RowBatch], foreign: Sequence[bool] = ()) -> None:
        self._batches = batches
        self._size = sum(len(batch) for batch in batches)
        self.foreign = np.array(foreign or [False] * self._size, bool)

    def __len__(self) -> int:
        return self._size

    def takes_part(self, others: Sequence[str]) -> np.ndarray:
        return ~self.foreign if not others else np.ones(self._size, bool)

    def batches(self) -> Iterator[tuple[int, RowBatch]]:
        first = 0
        for batch in self._batches:
            yield first, batch
            first += len(batch)


class MemorySketches:
    """Implements `posttrain.data.operations.base.Sketches`."""

    def __init__(self, sketches: Sequence[np.ndarray]) -> None:
        self._matrix = np.concatenate(sketches, axis=1)
        self.rows = np.arange(self._matrix.shape[1])

    def column(self, number: int) -> np.ndarray:
        return self._matrix[number]


def drops_of(
    operation: CorpusOperation,
    rows: Sequence[Row],
    batch_size: int = 7,
    foreign: Sequence[bool] = (),
) -> CorpusDrops:
    """What an operation over all rows drops, whatever the batches."""
    batches = [batch_of(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    sketches = MemorySketches([operation.sketch(batch) for batch in batches])
    return operation.decide(MemoryCorpus(batches, foreign), sketches)


def dropped(operation: CorpusOperation, rows: Sequence[Row]) -> dict[int, int]:
    """Number of every dropped row, and of the one that stays in its place."""
    drops = drops_of(operation, rows)
    return {rows[i].row: rows[k].row for i, k in zip(drops.rows, drops.kept, strict=True)}


def cleaned(
    folder: Path, rows: Sequence[Row], operations: Sequence[RowOperation | CorpusOperation]
) -> Cleaning:
    """Rows after operations, run by the real engine."""
    writer = ShardWriter(folder / "rows")
    writer.folder.mkdir(parents=True)
    with Workers(1) as workers:
        cleaning = Cleaning(folder, workers)
        cleaning.apply(operations, writer.write(rows))
    return cleaning
