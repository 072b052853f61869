"""Shingle sets that many tasks wrote, read by pairs: what similarity is computed on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from posttrain.data import minhash
from posttrain.data.cluster_job import DedupJob, load, load_raw
from posttrain.data.similar import Texts
from posttrain.data.words import Words

_SHINGLES = 2**23
"""Shingles held at a time, of 8 bytes each; one pair may have more."""
_TABLES = ("rows.npy", "offsets.npy")


class ShardSets(Texts):
    """The sets of the rows of all shards that take part in a comparison."""

    def __init__(self, job: DedupJob) -> None:
        self._job = job
        self._files: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def similarity(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Exact Jaccard similarity of pairs of rows, given by their numbers over all shards."""
        out = np.empty(len(left), np.float64)
        for part in self._parts(left, right):
            rows = np.unique(np.concatenate([left[part], right[part]]))
            i, j = np.searchsorted(rows, left[part]), np.searchsorted(rows, right[part])
            out[part] = minhash.jaccard(self._read(rows), i, j)
        return out

    def of(self, rows: np.ndarray) -> Texts:
        """The same with rows given by their place in `rows`."""
        return _Chosen(self, rows)

    def _parts(self, left: np.ndarray, right: np.ndarray) -> Iterator[slice]:
        """Stretches of pairs whose sets are not too much for memory."""
        rows = np.unique(np.concatenate([left, right]))
        counts = np.zeros(len(rows), np.int64)
        for shard, part in self._job.by_shard(rows):
            counts[part] = self._places(shard, rows[part])[1]
        sizes = counts[np.searchsorted(rows, left)] + counts[np.searchsorted(rows, right)]
        # A pair is in the part in which its last shingle is.
        part_of = np.cumsum(sizes) // _SHINGLES
        bounds = np.append(np.flatnonzero(np.diff(part_of, prepend=-1)), len(left))
        for begin, end in itertools.pairwise(bounds):
            yield slice(int(begin), int(end))

    def _read(self, rows: np.ndarray) -> Words:
        hashes, counts = [np.zeros(0, np.uint64)], [np.zeros(1, np.int64)]
        for shard, part in self._job.by_shard(rows):
            begins, sizes = self._places(shard, rows[part])
            # From the place in the result to the place in the file, set by set.
            shift = begins - (np.cumsum(sizes) - sizes)
            places = np.repeat(shift, sizes) + np.arange(sizes.sum())
            hashes.append(self._files[shard][2][places])
            counts.append(sizes)
        return Words(np.concatenate(hashes), np.cumsum(np.concatenate(counts)))

    def _places(self, shard: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the sets of a shard's rows begin in its file, and how large they are."""
        if shard not in self._files:
            known, offsets = (load(self._job.file("sets", shard, n)) for n in _TABLES)
            hashes = load_raw(self._job.file("sets", shard, "hashes.bin"), np.dtype("<u8"))
            self._files[shard] = known, offsets, hashes
        known, offsets, _ = self._files[shard]
        index = np.searchsorted(known, rows - self._job.first_rows[shard])
        return offsets[index], offsets[index + 1] - offsets[index]


class _Chosen(Texts):
    def __init__(self, sets: ShardSets, rows: np.ndarray) -> None:
        self._all = sets
        self._chosen = rows

    def similarity(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return self._all.similarity(self._chosen[left], self._chosen[right])
