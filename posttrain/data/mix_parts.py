"""The rows of a mix as hashes: which may be taken, which are, and that no side leaks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from posttrain.data.batch import RowBatch
from posttrain.data.kernels import mix_array
from posttrain.data.operations.base import Side
from posttrain.data.prefix import prefixed
from posttrain.data.prepared import PreparedDataset
from posttrain.data.split import Splitter
from posttrain.data.text import hash64
from posttrain.recipe.prepare import Split

HELD_OUT: tuple[Side, ...] = ("validation", "test")


@dataclass
class Part:
    """One side of one dataset: what is known of its rows, an entry a row, in file order."""

    ids: np.ndarray
    """S16."""
    text: np.ndarray
    """uint64, hash of what the row says, without a prefix."""
    keys: np.ndarray
    """uint64 of shape (rows, 2 or 4): hashes of prompt and text, also as they are prefixed."""
    prefixed: np.ndarray
    """bool, whether a prefix was put in; false for a conversation without a user turn."""
    held_in: np.ndarray
    """int16, number of the dataset that holds the row's prompt or text out; -1 for none."""
    copies: np.ndarray
    """int64, how often the row is taken."""
    places: np.ndarray
    """int64, positions in the output, those of the first taken row first, ascending for each."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def free(self) -> np.ndarray:
        """Positions of the rows that may be taken."""
        return np.flatnonzero(self.held_in < 0)

    @property
    def taken(self) -> int:
        """Rows in the output, repeats counted."""
        return int(self.copies.sum())


Parts = dict[Side, list[Part]]
"""For each side one part a dataset."""


def read_part(dataset: PreparedDataset, side: Side, prefix: str | None) -> Part:
    """One side of a dataset as hashes."""
    hasher = Splitter(Split(near_duplicates=None))
    ids, keys = [np.zeros(0, "S16")], [np.zeros((0, 4 if prefix else 2), np.uint64)]
    changed = [np.zeros(0, bool)]
    for batch in dataset.batches(side):
        own = [hasher.sketch(batch)]
        done = np.zeros(len(batch), bool)
        if prefix:
            table, done = prefixed(batch, prefix)
            own.append(hasher.sketch(RowBatch(batch.family, table)))
        ids.append(np.array(batch.table.column("id").to_pylist(), "S16"))
        keys.append(np.vstack(own).T)
        changed.append(done)
    every = np.concatenate(keys)
    count = len(every)
    return Part(
        ids=np.concatenate(ids),
        text=every[:, 1].copy(),
        keys=every,
        prefixed=np.concatenate(changed),
        held_in=np.full(count, -1, np.int16),
        copies=np.zeros(count, np.int64),
        places=np.zeros(0, np.int64),
    )


def keep_sides_apart(parts: Parts) -> None:
    """Mark training rows that any dataset holds out, and validation rows that any tests on.

    Each dataset was split by itself: what one trains on another may have put aside.
    """
    pairs: list[tuple[Side, tuple[Side, ...]]] = [("train", HELD_OUT), ("validation", ("test",))]
    for side, others in pairs:
        held = [
            np.unique(np.concatenate([parts[other][number].keys.ravel() for other in others]))
            for number in range(len(parts["train"]))
        ]
        for part in parts[side]:
            for number, keys in enumerate(held):
                found = np.isin(part.keys, keys).any(axis=1)
                part.held_in[found & (part.held_in < 0)] = number


def choose_copies(part: Part, size: int, seed: int) -> np.ndarray:
    """How often each row is taken: all equally often, and once more those first by hash."""
    copies = np.zeros(len(part), np.int64)
    free = part.free
    if not size:
        return copies
    every, more = divmod(size, len(free))
    copies[free] = every
    hashes = mix_array(part.text[free] ^ salt("sample", seed))
    copies[free[np.lexsort((part.ids[free], hashes))[:more]]] += 1
    return copies


def assert_no_leak(parts: Parts) -> None:
    """Raise if a prompt or a text is about to stand on two sides."""
    keys = {
        side: np.concatenate([part.keys[part.copies > 0].ravel() for part in own])
        for side, own in parts.items()
    }
    for one, other in itertools.combinations(keys, 2):
        if np.isin(keys[one], keys[other]).any():
            raise RuntimeError(f"the mix put one prompt or text on two sides: {one} and {other}")


def salt(*parts: object) -> np.uint64:
    """What makes one use of a row's hash independent of another."""
    return np.uint64(hash64("\0".join(map(str, parts))))
