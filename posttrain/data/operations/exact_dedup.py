"""Exact deduplication: of rows that say the same, the first in source order stays."""

from __future__ import annotations

import hashlib

import numpy as np

from posttrain.data.batch import RowBatch
from posttrain.data.grouping import group_equal
from posttrain.data.operations.base import Corpus, CorpusDrops, Sketches
from posttrain.data.rows import KtoExample, Row, all_messages
from posttrain.data.text import normalise
from posttrain.recipe.prepare import ExactDedup


class ExactDuplicates:
    """Drops a row whose normalised text was seen before.

    The sketch is 16 bytes a row. Who says what counts: equal words in other roles, or another KTO
    label, are another row.
    """

    name = "exact_dedup"

    def __init__(self, config: ExactDedup) -> None:
        self._ignore_case = config.ignore_case
        self._against = config.against

    def sketch(self, batch: RowBatch) -> np.ndarray:
        """uint64 of shape (2, rows): a 128-bit hash of the normalised text."""
        if batch.family == "documents":
            keys = [self._digest(f"assistant\0{self._normal(text)}\0") for text in batch.texts]
        else:
            keys = [self._digest(self._said(row)) for row in batch.rows]
        return np.frombuffer(b"".join(keys), np.uint64).reshape(len(keys), 2).T.copy()

    def decide(self, corpus: Corpus, sketches: Sketches) -> CorpusDrops:
        """All rows but the first of each group of equal ones."""
        takes_part = corpus.takes_part(self._against)[sketches.rows]
        rows = sketches.rows[takes_part]
        first, second = sketches.column(0)[takes_part], sketches.column(1)[takes_part]
        # Half of the hash groups; the whole of it decides.
        dropped, kept = [], []
        for group in group_equal(first, np.arange(len(rows))):
            _, index, inverse = np.unique(second[group], return_index=True, return_inverse=True)
            again = np.arange(len(group)) != index[inverse]
            dropped.append(rows[group[again]])
            kept.append(rows[group[index[inverse[again]]]])
        return CorpusDrops.of(dropped, kept, "duplicate", corpus)

    def _said(self, row: Row) -> str:
        parts = [f"{m.role}\0{self._normal(m.content)}\0" for m in all_messages(row)]
        if isinstance(row, KtoExample):
            parts.append(str(row.label))
        return "".join(parts)

    def _normal(self, text: str) -> str:
        return normalise(text, ignore_case=self._ignore_case)

    @staticmethod
    def _digest(text: str) -> bytes:
        return hashlib.blake2b(text.encode(), digest_size=16).digest()
