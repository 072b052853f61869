"""The split into training, validation and test rows, decided by content alone.

Rows are kept together if they have the same group key (the first user turn, normalised and without
case; a document's text; a built-in row's subject) or are near duplicates of each other. A whole
cluster goes where the hash of its least group key says. So the same prompt never stands on two
sides, a chat and a preference about one prompt stand on the same side, and adding rows moves none
but their own near duplicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.data import kernels, minhash
from posttrain.data.batch import RowBatch
from posttrain.data.operations.base import Corpus, CorpusDrops, Side, Sketches
from posttrain.data.rows import Row, all_messages
from posttrain.data.similar import Pairs, components, similar_pairs
from posttrain.data.text import hash64, normalise
from posttrain.errors import DataError
from posttrain.recipe.prepare import Split

SIDES: tuple[Side, ...] = ("train", "validation", "test")
_BANDS = 32
_GROUP, _TEXT, _TIE, _FIRST_BAND = 0, 1, 2, 3


@dataclass(frozen=True)
class SplitResult:
    """The side of every row."""

    sides: np.ndarray
    """int8, an index into `SIDES` for every row; meaningless for dropped ones."""
    drops: CorpusDrops
    """Rows that repeat a test set given by the user."""
    text: np.ndarray
    """uint64, for every row a hash of what it says; orders rows by content."""
    checked: str
    """What the leak check looked at, in a sentence."""


class Splitter:
    """Sketches rows for the split, then decides it."""

    name = "split"

    def __init__(self, config: Split) -> None:
        self._config = config

    def sketch(self, batch: RowBatch) -> np.ndarray:
        """uint64 of shape (columns, rows): group key, text, tie-break, band keys."""
        normal = [normalise(text) for text in batch.texts]
        groups = np.array([hash64(key) for key in _group_keys(batch, normal)], np.uint64)
        texts = np.array([hash64(text) for text in normal], np.uint64)
        if self._config.near_duplicates is None:
            return np.vstack([groups, texts])
        near = minhash.sketch(batch.arrow_texts, _BANDS)
        return np.vstack([groups, texts, near.ties, near.keys])

    def split(self, corpus: Corpus, sketches: Sketches, test: str | None = None) -> SplitResult:
        """Decide the side of each row that is left.

        Args:
            corpus: All rows.
            sketches: Of the rows that are left.
            test: Origin of the rows that are the test set, if the user gave one.

        Raises:
            DataError: too few different prompts to have a row on each side.
        """
        origins = (test,) if test else ()
        mask = corpus.takes_part(origins)[sketches.rows]
        rows = sketches.rows[mask]
        group = sketches.column(_GROUP)[mask]
        cluster = self._clusters(corpus, sketches, mask, rows, group)
        given = corpus.foreign[rows]
        repeats = np.isin(cluster, cluster[given]) & ~given
        side = self._sides(cluster[~repeats & ~given], group[~repeats & ~given])
        sides = np.full(len(corpus), SIDES.index("test"), np.int8)
        sides[rows[~repeats & ~given]] = side
        text = np.zeros(len(corpus), np.uint64)
        text[rows] = sketches.column(_TEXT)[mask]
        stays = ~repeats
        checked = self._assert_no_leak(
            sides[rows[stays]], group[stays], text[rows[stays]], cluster[stays]
        )
        first_given = dict(zip(cluster[given][::-1], rows[given][::-1], strict=True))
        kept = np.array([first_given[c] for c in cluster[repeats]], np.int64)
        drops = CorpusDrops(rows[repeats], kept, "repeats the test set")
        return SplitResult(sides, drops, text, checked)

    def _clusters(
        self,
        corpus: Corpus,
        sketches: Sketches,
        mask: np.ndarray,
        rows: np.ndarray,
        group: np.ndarray,
    ) -> np.ndarray:
        """A number for each of `rows`, equal for those that are kept together."""
        # Rows of one group are chained: each to the next.
        order = np.argsort(group, kind="stable")
        same = group[order][1:] == group[order][:-1]
        left, right = rows[order][:-1][same], rows[order][1:][same]
        similarity = np.ones(len(left))
        if self._config.near_duplicates is not None:
            near = self._near(corpus, sketches, mask, rows, self._config.near_duplicates)
            left = np.concatenate([left, near.left])
            right = np.concatenate([right, near.right])
            similarity = np.concatenate([similarity, near.similarity])
        return np.asarray(components(Pairs(left, right, similarity), len(corpus))[rows])

    def _near(
        self,
        corpus: Corpus,
        sketches: Sketches,
        mask: np.ndarray,
        rows: np.ndarray,
        threshold: float,
    ) -> Pairs:
        priority = np.zeros(len(corpus), np.int64)
        priority[rows[np.lexsort((rows, sketches.column(_TIE)[mask]))]] = np.arange(len(rows))
        keys = (sketches.column(_FIRST_BAND + band)[mask] for band in range(_BANDS))
        return similar_pairs(keys, rows, corpus.batches(), threshold, priority)

    def _sides(self, cluster: np.ndarray, group: np.ndarray) -> np.ndarray:
        """Indices into SIDES; each wanted side gets at least one cluster.

        Should the hashes leave a side empty, which only happens to small datasets, the cluster
        nearest to it is moved over.
        """
        distinct, number = np.unique(cluster, return_inverse=True)
        wanted = 2 + (self._config.test > 0)
        if len(distinct) < wanted:
            few = f"{len(group)} rows with {len(distinct)} different prompts"
            raise DataError(
                f"cannot keep rows away from training: {few}; there must be at least {wanted} that "
                "differ in their prompts and are no near duplicates"
            )
        least = np.full(len(distinct), np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(least, number, group)
        place = (kernels.mix_array(least) >> np.uint64(11)).astype(np.float64) / 2**53
        validation, test = self._config.validation, self._config.test
        side = np.where(place < validation, 1, np.where(place < validation + test, 2, 0))
        ascending = np.argsort(place, kind="stable")
        if test and not (side == 2).any():
            candidates = ascending[side[ascending] == 0]
            side[candidates[0] if len(candidates) else ascending[-1]] = 2
        if not (side == 1).any():
            side[ascending[0]] = 1
        if not (side == 0).any():
            side[ascending[-1]] = 0
        if test and not (side == 2).any():
            side[ascending[-2]] = 2
        return side[number].astype(np.int8)

    def _assert_no_leak(
        self, sides: np.ndarray, group: np.ndarray, text: np.ndarray, cluster: np.ndarray
    ) -> str:
        """Raise if equal texts, prompts or near duplicates stand on two sides."""
        for what, keys in (("prompt", group), ("text", text), ("near-duplicate cluster", cluster)):
            pairs = np.unique(np.stack([keys.astype(np.uint64), sides.astype(np.uint64)]), axis=1)
            if len(np.unique(pairs[0])) < pairs.shape[1]:
                raise RuntimeError(f"the split put one {what} on two sides")
        near = self._config.near_duplicates
        also = f", and no cluster of near duplicates (similarity {near:g} and more)" if near else ""
        return f"Checked: no prompt and no text stands on two sides{also}."


def group_key(row: Row) -> str:
    """What keeps rows together: rows of equal keys are never split."""
    if row.subject is not None:
        return f"subject\0{row.subject}"
    messages = all_messages(row)
    asked = next((message for message in messages if message.role == "user"), messages[0])
    return f"{asked.role}\0{normalise(asked.content, ignore_case=True)}"


def _group_keys(batch: RowBatch, normal: Sequence[str]) -> list[str]:
    """`group_key` of each row; of documents from their normalised texts."""
    if batch.family != "documents":
        return [group_key(row) for row in batch.rows]
    subjects = batch.table.column("subject").to_pylist()
    return [
        f"assistant\0{normalise(text, ignore_case=True)}"
        if subject is None
        else f"subject\0{subject}"
        for text, subject in zip(normal, subjects, strict=True)
    ]
