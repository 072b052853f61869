"""Near deduplication: of rows that are nearly the same, the best one stays."""

from __future__ import annotations

import re

import numpy as np

from posttrain.data import minhash
from posttrain.data.batch import RowBatch
from posttrain.data.operations.base import Corpus, CorpusDrops, Sketches
from posttrain.data.similar import Pairs, keep_best, similar_pairs
from posttrain.errors import DataError
from posttrain.recipe.prepare import NearDedup


class NearDuplicates:
    """MinHash proposes, exact Jaccard similarity decides; see `posttrain.data.similar`."""

    name = "near_dedup"

    def __init__(self, config: NearDedup) -> None:
        self._config = config
        self.pairs: Pairs | None = None
        """Found by `decide`, for the report."""

    def sketch(self, batch: RowBatch) -> np.ndarray:
        """uint64 of shape (bands + 2, rows): band keys, merit, and a hash to break ties."""
        near = minhash.sketch(batch.arrow_texts, self._config.bands)
        return np.vstack([near.keys, self._merit(batch, near.words), near.ties])

    def decide(self, corpus: Corpus, sketches: Sketches) -> CorpusDrops:
        """Every row that is nearly the same as a better one that stays."""
        takes_part = corpus.takes_part(self._config.against)[sketches.rows]
        rows = sketches.rows[takes_part]
        bands = self._config.bands
        merit, tie = sketches.column(bands)[takes_part], sketches.column(bands + 1)[takes_part]
        priority = np.zeros(len(corpus), np.int64)
        # Descending merit; equal ones by content, and by position only where that is equal too.
        priority[rows[np.lexsort((rows, tie, ~merit))]] = np.arange(len(rows))
        keys = (sketches.column(band)[takes_part] for band in range(bands))
        self.pairs = similar_pairs(keys, rows, corpus.batches(), self._config.threshold, priority)
        dropped, kept, similarity = keep_best(self.pairs, priority, corpus.foreign)
        details = [f"similarity {value:.2f}" for value in similarity]
        uncompared = self.pairs.uncompared
        found = {"rows of crowded groups compared with 64 others only": uncompared}
        return CorpusDrops(dropped, kept, "near duplicate", details, found if uncompared else {})

    def _merit(self, batch: RowBatch, words: np.ndarray) -> np.ndarray:
        """What makes a row better, as uint64; more is better."""
        if self._config.keep == "longest":
            return words.astype(np.uint64)
        column = "date" if self._config.keep == "newest" else "score"
        values = batch.table.column(column).to_pylist()
        if None in values:
            missing = batch.table.slice(values.index(None), 1).to_pylist()[0]
            raise DataError(
                f"{missing['file']}:{missing['row']}: no `{column}`, which near_dedup needs to "
                f"keep the {self._config.keep} row; name the column as `columns: {{{column}: ...}}`"
            )
        if column == "date":
            return np.array([_date_number(value) for value in values], np.uint64)
        return sortable(np.array(values, np.float64))


def sortable(values: np.ndarray) -> np.ndarray:
    """float64 as uint64 in the same order."""
    bits = values.view(np.uint64)
    sign = np.uint64(1) << np.uint64(63)
    return np.where(bits & sign, ~bits, bits | sign)


def _date_number(date: str) -> int:
    """The digits of an ISO 8601 date, to the second."""
    return int(re.sub(r"\D", "", date)[:14].ljust(14, "0") or "0")
