"""Near-duplicate removal for JSON Lines of documents, by itself: no ledger, no split, no report.

`prepare` does the same among its other operations; this is the short way from files to a file,
for a corpus that fits into memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from posttrain.data import kernels, minhash
from posttrain.data.batch import RowBatch
from posttrain.data.similar import Pairs, iterate_batches, keep_best, similar_pairs
from posttrain.errors import DataError
from posttrain.store.files import temporary_beside

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK_BYTES = 8 * 2**20
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
        chunks = [
            future.result()
            for future in [pool.submit(_read_chunk, c, column, bands) for c in line_chunks(paths)]
        ]
    rows = sum(len(chunk.batch) for chunk in chunks)
    words = np.concatenate([_NONE, *(chunk.sketch.words for chunk in chunks)])
    ties = np.concatenate([_NONE.astype(np.uint64), *(chunk.sketch.ties for chunk in chunks)])
    order = np.lexsort((np.arange(rows), ties, -words))
    priority = np.empty(rows, np.int64)
    priority[order] = np.arange(rows)
    pairs = _pairs(chunks, rows, threshold, bands, priority)
    dropped, kept, similarity = keep_best(pairs, priority)
    _copy(out, chunks, dropped)
    seconds = time.perf_counter() - begin
    return DedupStats(rows, dropped, kept, similarity, pairs.uncompared, seconds)


@dataclass(frozen=True)
class _Chunk:
    """Some megabytes of lines."""

    lines: list[bytes]
    batch: RowBatch
    sketch: minhash.Sketch


def _pairs(
    chunks: list[_Chunk], rows: int, threshold: float, bands: int, priority: np.ndarray
) -> Pairs:
    none = _NONE.astype(np.uint64)
    keys = (
        np.concatenate([none, *(chunk.sketch.keys[band] for chunk in chunks)])
        for band in range(bands)
    )
    batches = iterate_batches([chunk.batch for chunk in chunks])
    return similar_pairs(keys, np.arange(rows), batches, threshold, priority)


def line_chunks(paths: Sequence[Path]) -> Iterator[tuple[str, list[bytes]]]:
    """Whole lines of all files, some megabytes at a time, with a name for errors."""
    for path in paths:
        try:
            with path.open("rb") as file:
                while data := file.read(_CHUNK_BYTES):
                    data += file.readline()
                    # Not splitlines, which also cuts at a lone carriage return.
                    lines = [line + b"\n" for line in data.split(b"\n") if line.strip()]
                    if lines:
                        yield str(path), lines
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _read_chunk(chunk: tuple[str, list[bytes]], column: str, bands: int) -> _Chunk:
    name, lines = chunk
    texts = parse_texts(name, lines, column)
    return _Chunk(lines, RowBatch("documents", texts_table(texts)), minhash.sketch(texts, bands))


def parse_texts(name: str, lines: list[bytes], column: str) -> pa.Array:
    """The texts under `column` of lines of JSON, one a line.

    Raises:
        DataError: a line is no JSON object, or has no such text.
    """
    import pyarrow as pa
    import pyarrow.json as pj

    torn = [n for n, line in enumerate(lines) if line[:1] + line[-2:] != b"{}\n"]
    if any(lines[n].strip()[:1] + lines[n].strip()[-1:] != b"{}" for n in torn):
        raise DataError(f"{name}: a line is no JSON object; `posttrain data prepare` says which")
    data = b"".join(lines)
    schema = pa.schema([(column, pa.large_string())])
    try:
        table = pj.read_json(
            pa.BufferReader(data),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=pj.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        )
    except pa.ArrowException as error:
        raise DataError(f"{name}: not JSON Lines with a text under `{column}`: {error}") from error
    texts = table.column(column).combine_chunks()
    if texts.null_count or len(texts) != len(lines):
        raise DataError(
            f"{name}: a line has no text under `{column}`; `posttrain data prepare` says which"
        )
    return texts


def texts_table(texts: pa.Array) -> pa.Table:
    """A table with nothing but texts."""
    import pyarrow as pa

    return pa.table({"text": texts})


def _copy(out: Path, chunks: list[_Chunk], dropped: np.ndarray) -> None:
    first = 0
    with temporary_beside(out) as temporary, temporary.open("wb") as file:
        for chunk in chunks:
            stays = np.ones(len(chunk.lines), bool)
            begin, end = np.searchsorted(dropped, [first, first + len(chunk.lines)])
            stays[dropped[begin:end] - first] = False
            file.writelines(chunk.lines[i] for i in np.flatnonzero(stays))
            first += len(chunk.lines)
