"""The contract of everything that cleans rows.

Rows come in batches. An operation keeps, edits or drops each of them; it never adds or reorders
one. Most decide on every row by itself (`RowOperation`) and so run batch by batch, in any number
of processes. Deduplication needs to see all rows (`CorpusOperation`): it sketches batch by batch,
and then decides once, from the sketches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from posttrain.data.batch import RowBatch
from posttrain.data.rows import Row

Side = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Drop:
    """Why a row is dropped."""

    reason: str
    """A short category that can be counted, such as `too short`. Few different ones."""
    detail: str | None = None
    """The numbers behind it, such as `34 words; at least 50`."""


@dataclass(frozen=True)
class Edit:
    """A row whose text was changed."""

    row: Row | None
    """The row as it goes on, under its old id; None once it has been written."""
    detail: str
    """What was changed, such as `2 email, 1 phone`."""


@dataclass
class Decisions:
    """What an operation decided about a batch. Rows not named stay as they are."""

    drops: dict[int, Drop] = field(default_factory=dict)
    """By position in the batch."""
    edits: dict[int, Edit] = field(default_factory=dict)
    """By position in the batch; a dropped row has none."""
    found: Counter[str] = field(default_factory=Counter)
    """Whatever else is worth counting for the report, such as rows by language."""


class RowOperation(Protocol):
    """Decides on every row by itself. Must survive pickling: it runs in worker processes."""

    @property
    def name(self) -> str:
        """Key in the recipe, and name in ledger and report."""
        ...

    def apply(self, batch: RowBatch) -> Decisions:
        """Decide on the rows of a batch. The same row gets the same decision in any batch."""
        ...


class Sketches(Protocol):
    """The sketches of all rows, in source order; read column by column, since they may be large."""

    @property
    def rows(self) -> np.ndarray:
        """int64; positions of the rows that were sketched, ascending."""
        ...

    def column(self, number: int) -> np.ndarray:
        """One column, a value a sketched row."""
        ...


class Corpus(Protocol):
    """All rows, as an operation that decides over all of them sees them."""

    def __len__(self) -> int:
        """Number of rows, dropped ones and those of other datasets included."""
        ...

    @property
    def foreign(self) -> np.ndarray:
        """Mask: rows of other datasets, which are compared with but never dropped."""
        ...

    def takes_part(self, others: Sequence[str]) -> np.ndarray:
        """Mask: rows not dropped so far, of this dataset and of the other ones named."""
        ...

    def batches(self) -> Iterator[tuple[int, RowBatch]]:
        """All batches in source order, each with the position of its first row."""
        ...


@dataclass(frozen=True)
class CorpusDrops:
    """Rows that an operation over all rows drops, and why."""

    rows: np.ndarray
    """int64; positions of the dropped rows, ascending."""
    kept: np.ndarray
    """int64; for each of them the row that stays in its place."""
    reason: str
    details: Sequence[str] | None = None
    """For each of them the numbers behind it."""
    found: Mapping[str, int] = field(default_factory=dict)
    """Whatever else is worth counting for the report."""

    @classmethod
    def of(
        cls,
        dropped: Sequence[np.ndarray],
        kept: Sequence[np.ndarray],
        reason: str,
        corpus: Corpus,
    ) -> CorpusDrops:
        """Put pieces together, in ascending order, without rows of other datasets."""
        rows = np.concatenate([np.zeros(0, np.int64), *dropped])
        for_them = np.concatenate([np.zeros(0, np.int64), *kept])
        own = ~corpus.foreign[rows]
        rows, for_them = rows[own], for_them[own]
        order = np.argsort(rows, kind="stable")
        return cls(rows[order], for_them[order], reason)


class Sketcher(Protocol):
    """Remembers of each row what a decision needs that looks at all rows.

    Must survive pickling: it sketches in worker processes.
    """

    @property
    def name(self) -> str:
        """Key in the recipe, and name in ledger and report."""
        ...

    def sketch(self, batch: RowBatch) -> np.ndarray:
        """What must be remembered of each row: uint64 of shape (columns, rows)."""
        ...


@runtime_checkable
class CorpusOperation(Sketcher, Protocol):
    """Decides by looking at all rows."""

    def decide(self, corpus: Corpus, sketches: Sketches) -> CorpusDrops:
        """Decide on all rows at once."""
        ...
