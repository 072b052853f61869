"""Near-duplicate removal for JSON Lines of documents, by itself: no ledger, no split, no report.

`prepare` does the same among its other operations; this is the short way from files to a file,
for a corpus that fits into memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from posttrain.data import kernels, minhash
from posttrain.data.batch import RowBatch
from posttrain.data.lines import Lines
from posttrain.data.similar import Pairs, iterate_batches, keep_best, similar_pairs
from posttrain.store.files import temporary_beside

if TYPE_CHECKING:
    pass

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class DedupStats:
    """What became of the documents."""

    rows: int
    dropped: np.ndarray
    """Positions of the dropped documents over all files, ascending."""
    kept: np.ndarray
    """For each of them the document that stays in its place."""
    similarity: np.ndarray
    """And how similar the two are: Jaccard similarity of word 5-grams."""
    uncompared: int
    """Rows that shared a key with so many unlike rows that not all were compared."""
    seconds: float
    """Wall-clock time from opening the first file to the closed output."""


def deduplicate_jsonl(
    paths: Sequence[Path],
    out: Path,
    *,
    threshold: float = 0.8,
    bands: Literal[16, 32] = 32,
    column: str = "text",
    processes: int | None = None,
) -> DedupStats:
    """Copy JSON Lines, leaving out every line whose text is nearly that of a line that stays.

    Of similar lines the longest stays. Lines are copied as they are, in order; blank ones are not.

    Args:
        paths: Files to read.
        out: File to write; appears when it is complete.
        threshold: Jaccard similarity of word 5-grams from which two texts count as the same.
        bands: Of the 128 MinHash values; see `posttrain.data.minhash`.
        column: Key of the text.
        processes: Threads that parse and sketch; one a core by default.

    Raises:
        DataError: a file cannot be read as JSON Lines with such a key.
        ValueError: a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, not {threshold}")
    begin = time.perf_counter()
    kernels.use_numba()  # compiled once, before the threads start
    with ThreadPoolExecutor(processes or os.cpu_count()) as pool:
        read = [pool.submit(_sketch, lines, column, bands) for lines in Lines.read(paths)]
        chunks = [future.result() for future in read]
        rows = sum(len(chunk.lines) for chunk in chunks)
        priority = _priority(chunks, rows)
        pairs = _pairs(chunks, rows, threshold, bands, priority, pool)
    dropped, kept, similarity = keep_best(pairs, priority)
    _copy(out, chunks, dropped)
    seconds = time.perf_counter() - begin
    return DedupStats(rows, dropped, kept, similarity, pairs.uncompared, seconds)


@dataclass(frozen=True)
class _Chunk:
    """Some megabytes of lines, and what is remembered of them."""

    lines: Lines
    batch: RowBatch
    sketch: minhash.Sketch


def _sketch(lines: Lines, column: str, bands: int) -> _Chunk:
    import pyarrow as pa

    texts = lines.texts(column)
    batch = RowBatch("documents", pa.table({"text": texts}))
    return _Chunk(lines, batch, minhash.sketch(texts, bands))


def _priority(chunks: list[_Chunk], rows: int) -> np.ndarray:
    """The place of each line: the longest first; equal ones by content, then by position."""
    words = np.concatenate([_NONE, *(chunk.sketch.words for chunk in chunks)])
    ties = np.concatenate([_NONE.astype(np.uint64), *(chunk.sketch.ties for chunk in chunks)])
    priority = np.empty(rows, np.int64)
    priority[np.lexsort((np.arange(rows), ties, -words))] = np.arange(rows)
    return priority


def _pairs(
    chunks: list[_Chunk],
    rows: int,
    threshold: float,
    bands: int,
    priority: np.ndarray,
    pool: ThreadPoolExecutor,
) -> Pairs:
    none = _NONE.astype(np.uint64)
    keys = (
        np.concatenate([none, *(chunk.sketch.keys[band] for chunk in chunks)])
        for band in range(bands)
    )
    batches = iterate_batches([chunk.batch for chunk in chunks])
    return similar_pairs(keys, np.arange(rows), batches, threshold, priority, pool.map)


def _copy(out: Path, chunks: list[_Chunk], dropped: np.ndarray) -> None:
    first = 0
    with temporary_beside(out) as temporary, temporary.open("wb") as file:
        for chunk in chunks:
            stays = np.ones(len(chunk.lines), bool)
            begin, end = np.searchsorted(dropped, [first, first + len(stays)])
            stays[dropped[begin:end] - first] = False
            chunk.lines.copy(file, stays)
            first += len(stays)
