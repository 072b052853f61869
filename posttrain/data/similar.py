"""Pairs of nearly equal rows, and which rows of their clusters stay.

Rows that share a band key are candidates; a pair counts only if its exact Jaccard similarity
reaches the threshold. A row is dropped only in favour of a row that stays and is that similar to
it: a chain of similar rows is thinned, not swallowed. What stays does not depend on the order of
the rows.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data import minhash
from posttrain.data.batch import RowBatch
from posttrain.data.grouping import group_equal
from posttrain.data.words import Words

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

CROWDED = 64
"""Rows with one band key up to which every pair is compared. In a larger group each row is
compared with up to as many leaders instead: work stays linear in the size of the group."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows whose similarity reaches the threshold."""

    left: np.ndarray
    """int64; the smaller position of each pair."""
    right: np.ndarray
    """int64; the larger one."""
    similarity: np.ndarray
    """float64; exact Jaccard similarity of the rows' sets of shingles."""
    uncompared: int = 0
    """Rows that shared a key with so many unlike rows that not all were compared."""

    def __len__(self) -> int:
        return len(self.left)


class Texts:
    """Shingle sets of chosen rows, kept in a temporary file and mapped into memory."""

    def __init__(self, rows: np.ndarray, sets: Words) -> None:
        self._rows = rows
        self._sets = sets

    @classmethod
    def read(
        cls,
        rows: np.ndarray,
        batches: Iterable[tuple[int, RowBatch]],
        folder: Path,
        run: Map = map,
    ) -> Texts:
        """Compute the sets of the rows at these positions.

        Args:
            rows: Positions, ascending.
            batches: All rows, each batch with the position of its first row.
            folder: For the file, which grows by 8 bytes a distinct shingle.
            run: Where batches are worked on: here, or in threads by an executor's `map`.
        """
        path = folder / "shingles.bin"
        sizes = [np.zeros(1, np.int64)]
        with path.open("wb") as file:
            for sets in run(lambda batch: _sets_of(rows, *batch), batches):
                sets.hashes.tofile(file)
                sizes.append(sets.counts)
        offsets = np.cumsum(np.concatenate(sizes))
        empty = offsets[-1] == 0
        hashes = np.zeros(0, np.uint64) if empty else np.memmap(path, np.uint64, mode="r")
        return cls(rows, Words(hashes, offsets))

    def similarity(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Exact Jaccard similarity of pairs of rows, given by their positions."""
        i, j = np.searchsorted(self._rows, left), np.searchsorted(self._rows, right)
        return minhash.jaccard(self._sets, i, j)


def _sets_of(rows: np.ndarray, first: int, batch: RowBatch) -> Words:
    """Shingle sets of those of the rows that are in a batch."""
    begin, end = np.searchsorted(rows, [first, first + len(batch)])
    return minhash.shingle_sets(batch.take(rows[begin:end] - first).arrow_texts)


def similar_pairs(
    bands: Iterable[np.ndarray],
    rows: np.ndarray,
    batches: Iterable[tuple[int, RowBatch]],
    threshold: float,
    priority: np.ndarray,
    run: Map = map,
) -> Pairs:
    """Find the pairs of rows that are at least `threshold` similar.

    Args:
        bands: For each band the keys of the rows, uint64.
        rows: Positions of the rows that take part, ascending; one a key.
        batches: All rows, for the exact comparison.
        threshold: Jaccard similarity, in (0, 1].
        priority: One distinct number a position of all rows; decides who leads a crowded group.
        run: Where work on bands and batches is done: here, or in threads by an executor's `map`.
    """
    candidates, crowds = candidate_pairs(bands, rows, run)
    involved = np.unique(np.concatenate([*unpack_pairs(candidates), *crowds]))
    with tempfile.TemporaryDirectory(prefix="posttrain-similar-") as folder:
        texts = Texts.read(involved, batches, Path(folder), run)
        left, right = unpack_pairs(candidates)
        similarity = texts.similarity(left, right)
        found = similarity >= threshold
        pairs = Pairs(left[found], right[found], similarity[found])
        return _join(pairs, [compare_crowd(c, texts, threshold, priority) for c in crowds])


def candidate_pairs(
    bands: Iterable[np.ndarray], rows: np.ndarray, run: Map = map
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Distinct pairs, as one uint64 each, and the groups too large to compare all pairs of."""
    found = np.zeros(0, np.uint64)
    crowds: dict[bytes, np.ndarray] = {}
    for pairs, large in run(lambda keys: _pairs_of_band(keys, rows), bands):
        found = np.union1d(found, pairs)
        crowds.update({crowd.tobytes(): crowd for crowd in large})
    return found, list(crowds.values())


def _pairs_of_band(keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Pairs of the rows that share a key of one band, and the large groups."""
    groups = group_equal(keys, rows)
    small = np.repeat(groups.sizes <= CROWDED, groups.sizes)
    group = np.repeat(np.arange(len(groups.sizes)), groups.sizes)[small]
    members = groups.rows[small]
    pairs = [np.zeros(0, np.uint64)]
    for distance in range(1, CROWDED):
        same = group[distance:] == group[:-distance]
        if not same.any():
            break
        pairs.append(pack_pairs(members[:-distance][same], members[distance:][same]))
    large = [
        groups.rows[groups.starts[number] : groups.starts[number + 1]]
        for number in np.flatnonzero(groups.sizes > CROWDED)
    ]
    return np.concatenate(pairs), large


def compare_crowd(crowd: np.ndarray, texts: Texts, threshold: float, priority: np.ndarray) -> Pairs:
    """Compare each row with the leaders before it; who is like none of them leads in turn."""
    rest = crowd[np.argsort(priority[crowd])]
    left, right, similarities = [], [], []
    for _ in range(CROWDED):
        if len(rest) < 2:
            break
        leader, rest = rest[0], rest[1:]
        similarity = texts.similarity(np.full(len(rest), leader), rest)
        alike = similarity >= threshold
        left.append(np.minimum(leader, rest[alike]))
        right.append(np.maximum(leader, rest[alike]))
        similarities.append(similarity[alike])
        rest = rest[~alike]
    uncompared = len(rest) if len(rest) > 1 else 0
    none = np.zeros(0, np.int64)
    return Pairs(
        np.concatenate([none, *left]),
        np.concatenate([none, *right]),
        np.concatenate([np.zeros(0), *similarities]),
        uncompared,
    )


def _join(pairs: Pairs, others: list[Pairs]) -> Pairs:
    """All pairs, each once, ordered by position."""
    every = [pairs, *others]
    left, right = (np.concatenate([getattr(p, side) for p in every]) for side in ("left", "right"))
    packed, first = np.unique(pack_pairs(left, right), return_index=True)
    similarity = np.concatenate([p.similarity for p in every])[first]
    return Pairs(*unpack_pairs(packed), similarity, sum(p.uncompared for p in every))


def keep_best(
    pairs: Pairs, priority: np.ndarray, fixed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rows go, going through the rows from the best to the worst.

    A row stays if no row that stays is similar to it; so every dropped row has a similar one that
    stays, and no two that stay are similar.

    Args:
        pairs: Similar rows.
        priority: One distinct number a position of all rows; smaller is better.
        fixed: Mask of rows that always stay.

    Returns:
        Positions of the dropped rows, ascending; for each the row that stays in its place, the
        most similar one; and their similarity.
    """
    rows = np.unique(np.concatenate([pairs.left, pairs.right]))
    neighbours = _neighbours(pairs, rows)
    always = fixed[rows] if fixed is not None else np.zeros(len(rows), bool)
    stays = np.ones(len(rows), bool)
    dropped, kept, similarity = [], [], []
    for row in np.lexsort((priority[rows], ~always)):
        if always[row]:
            continue
        others, values = neighbours[row]
        # Better rows are decided already; a worse one cannot push this one out.
        better = always[others] | (priority[rows[others]] < priority[rows[row]])
        ahead = stays[others] & better
        if ahead.any():
            stays[row] = False
            best = np.flatnonzero(ahead)[np.argmax(values[ahead])]
            dropped.append(rows[row])
            kept.append(rows[others[best]])
            similarity.append(values[best])
    order = np.argsort(np.array(dropped, np.int64))
    return (
        np.array(dropped, np.int64)[order],
        np.array(kept, np.int64)[order],
        np.array(similarity, np.float64)[order],
    )


def components(pairs: Pairs, rows: int) -> np.ndarray:
    """Clusters of rows that are joined by similar pairs: for each row the least row of its own."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = coo_matrix((np.ones(len(pairs), bool), (pairs.left, pairs.right)), shape=(rows, rows))
    number, labels = connected_components(links, directed=False)
    least = np.full(number, rows, np.int64)
    np.minimum.at(least, labels, np.arange(rows))
    return np.asarray(least[labels])


def _neighbours(pairs: Pairs, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each of `rows` the indices of the rows similar to it, and how similar they are."""
    left, right = np.searchsorted(rows, pairs.left), np.searchsorted(rows, pairs.right)
    one, other = np.concatenate([left, right]), np.concatenate([right, left])
    order = np.argsort(one, kind="stable")
    starts = np.searchsorted(one[order], np.arange(len(rows) + 1))
    other, values = other[order], np.concatenate([pairs.similarity] * 2)[order]
    return [(other[a:b], values[a:b]) for a, b in itertools.pairwise(starts)]


def pack_pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A pair as one number, for up to 2**32 rows; the smaller position first."""
    small, large = np.minimum(left, right), np.maximum(left, right)
    return np.asarray((small.astype(np.uint64) << np.uint64(32)) | large.astype(np.uint64))


def unpack_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two positions of each packed pair."""
    mask = np.uint64(0xFFFFFFFF)
    return (packed >> np.uint64(32)).astype(np.int64), (packed & mask).astype(np.int64)


def iterate_batches(batches: list[RowBatch]) -> Iterator[tuple[int, RowBatch]]:
    """Batches with the position of each one's first row."""
    first = 0
    for batch in batches:
        yield first, batch
        first += len(batch)
