"""An index of evaluation items by their n-grams of words, and the search for texts in it.

What is indexed and why is said in `posttrain.data.operations.decontaminate`, which uses it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.words import Words, hash_words, ngram_hashes
from posttrain.errors import DataError
from posttrain.store.files import write_json

if TYPE_CHECKING:
    from posttrain.evaluate.contamination import EvaluationItem

_MOST_ITEMS = 10
"""An n-gram of more items than this is no item's own."""
_ROWS_AT_ONCE = 100_000
_SLOTS_PER_KEY = 16
_ARRAYS = ("keys", "owners", "lengths", "prefixes", "leaves", "numbers")


@dataclass(frozen=True)
class _Facts:
    """What an index knows beside its arrays; kept as `index.json`."""

    ngram: int
    short_ngram: int
    leaves: list[list[str]]
    """Benchmark and leaf task, by number."""
    items: dict[str, int]
    too_short: dict[str, int]
    unseen: dict[str, int]


@dataclass(frozen=True)
class Shared:
    """Runs of words that texts have in common with items: equally long arrays, an entry a run."""

    texts: np.ndarray
    """Number of the text, ascending."""
    starts: np.ndarray
    """Number of the run's first word in the text; ascending in each text."""
    lengths: np.ndarray
    """Words of the run."""
    items: np.ndarray
    """Number of the item in the index."""


class NgramIndex:
    """The n-grams of evaluation items, and for each an item that it comes from.

    Made by `build` or `open`. Takes about 15 bytes an n-gram; all worker processes of a machine
    share them when they open the same folder.
    """

    def __init__(self, arrays: dict[str, np.ndarray], facts: _Facts) -> None:
        self._arrays = arrays
        self._facts = facts
        self._keys = _Table(arrays["keys"])
        self._prefixes = _Table(arrays["prefixes"])
        self._short_lengths = [
            int(length) for length in np.unique(arrays["lengths"]) if length < facts.ngram
        ]

    @classmethod
    def build(cls, items: Sequence[EvaluationItem], ngram: int, short_ngram: int) -> NgramIndex:
        """Index all texts of all items.

        Args:
            items: As `posttrain.evaluate.contamination.evaluation_items` gives them.
            ngram: Words of an n-gram.
            short_ngram: Words that a shorter text needs to be looked for, whole.
        """
        leaf_of = {leaf: number for number, leaf in enumerate(dict.fromkeys(map(_leaf_of, items)))}
        leaves = np.array([leaf_of[_leaf_of(item)] for item in items], np.int32)
        words = hash_words([text for item in items for text in item.texts])
        alike = _first_alike(items)
        owners = np.repeat(alike, [len(item.texts) for item in items])
        runs = _all_runs(words, owners, ngram, short_ngram)
        own, found = _own_runs(runs, words, leaves, ngram)
        short = own.starts[own.lengths < ngram]
        names = [item.benchmark for item in items]
        questions = hash_words([item.question for item in items]).counts
        facts = _Facts(
            ngram=ngram,
            short_ngram=short_ngram,
            leaves=[list(leaf) for leaf in leaf_of],
            items=dict(Counter(names)),
            too_short=dict(Counter(itertools.compress(names, questions < short_ngram))),
            unseen=dict(Counter(itertools.compress(names, ~np.isin(alike, found)))),
        )
        arrays = {
            "keys": own.hashes,
            "owners": own.owners,
            "lengths": own.lengths.astype(np.uint8),
            "prefixes": np.unique(_run_hashes(words.hashes, short, short_ngram)),
            "leaves": leaves,
            "numbers": np.array([item.item for item in items], np.int32),
        }
        return cls(arrays, facts)

    @property
    def items(self) -> dict[str, int]:
        """Items by benchmark."""
        return dict(self._facts.items)

    @property
    def too_short(self) -> dict[str, int]:
        """Items by benchmark whose question has fewer than `short_ngram` words.

        They are found together with their choices or their answer, but not by the question alone.
        """
        return dict(self._facts.too_short)

    @property
    def unseen(self) -> dict[str, int]:
        """Items by benchmark that cannot be found at all: nothing in them is long enough."""
        return dict(self._facts.unseen)

    @property
    def sizes(self) -> tuple[int, int]:
        """Words of an n-gram, and of the shortest text that is looked for whole."""
        return self._facts.ngram, self._facts.short_ngram

    def __len__(self) -> int:
        """Number of different n-grams and short texts."""
        return len(self._arrays["keys"])

    def save(self, folder: Path) -> None:
        """Write to a folder, made if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in self._arrays.items():
            np.save(folder / f"{name}.npy", array)
        write_json(folder / "index.json", dataclasses.asdict(self._facts))

    @classmethod
    def open(cls, folder: Path) -> NgramIndex:
        """Open what `save` wrote, memory-mapped.

        Raises:
            DataError: The folder holds no index.
        """
        try:
            facts = _Facts(**json.loads((folder / "index.json").read_bytes()))
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"decontaminate: {folder} holds no n-gram index: {error}\n"
                "  write one there with NgramIndex.build(...).save(...)"
            ) from error
        return cls(arrays, facts)

    def place(self, item: int) -> tuple[str, str, int]:
        """Benchmark, leaf task and number in it of an item in `Shared.items`."""
        benchmark, leaf = self._facts.leaves[self._arrays["leaves"][item]]
        return benchmark, leaf, int(self._arrays["numbers"][item])

    def texts_by_benchmark(self, shared: Shared) -> dict[str, int]:
        """Texts that share a run with an item, by benchmark; a text may count for several."""
        names = [benchmark for benchmark, _ in self._facts.leaves]
        numbers = np.array([names.index(name) for name in names], np.int64)
        numbers = numbers[self._arrays["leaves"][shared.items]]
        pairs = np.unique(shared.texts * len(names) + numbers)
        return dict(Counter(names[number] for number in (pairs % len(names)).tolist()))

    def shared(self, words: Words) -> Shared:
        """All runs of words that the texts share with items."""
        ngram, short_ngram = self.sizes
        grams = ngram_hashes(words, ngram)
        at, keys = self._keys.find(grams.hashes)
        starts = [at + (words.offsets - grams.offsets)[_text_at(grams.offsets, at)]]
        found = [keys]
        grams = ngram_hashes(words, short_ngram)
        at, _ = self._prefixes.find(grams.hashes)
        text = _text_at(grams.offsets, at)
        at = at + (words.offsets - grams.offsets)[text]
        for length in self._short_lengths:
            whole = at[at + length <= words.offsets[text + 1]]
            which, keys = self._keys.find(_run_hashes(words.hashes, whole, length))
            starts.append(whole[which])
            found.append(keys)
        return self._sorted(words, np.concatenate(starts), np.concatenate(found))

    def _sorted(self, words: Words, starts: np.ndarray, keys: np.ndarray) -> Shared:
        order = np.lexsort((keys, starts))
        starts, keys = starts[order], keys[order]
        texts = _text_at(words.offsets, starts)
        return Shared(
            texts=texts,
            starts=starts - words.offsets[texts],
            lengths=self._arrays["lengths"][keys].astype(np.int64),
            items=self._arrays["owners"][keys],
        )


# --- building ---------------------------------------------------------------------------------


def _leaf_of(item: EvaluationItem) -> tuple[str, str]:
    return item.benchmark, item.leaf


def _first_alike(items: Sequence[EvaluationItem]) -> np.ndarray:
    """For each item the number of the first with the same question and answer.

    MMLU asks some twice, in two subjects or with the choices in another order.
    """
    first: dict[tuple[str, ...], int] = {}
    keys = ((item.question, *item.texts[-1:]) for item in items)
    return np.array([first.setdefault(key, number) for number, key in enumerate(keys)], np.int32)


@dataclass(frozen=True)
class _Runs:
    """Runs of words that may become keys: equally long arrays, an entry a run."""

    hashes: np.ndarray
    owners: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def take(self, which: np.ndarray) -> _Runs:
        fields = (getattr(self, field.name)[which] for field in dataclasses.fields(self))
        return _Runs(*fields)


def _all_runs(words: Words, owners: np.ndarray, ngram: int, short_ngram: int) -> _Runs:
    """All n-grams of texts with these owners, and all shorter texts whole."""
    grams = ngram_hashes(words, ngram)
    shift = words.offsets[:-1] - grams.offsets[:-1]
    parts = [
        _Runs(
            grams.hashes,
            np.repeat(owners, grams.counts),
            np.repeat(shift, grams.counts) + np.arange(len(grams.hashes)),
            np.full(len(grams.hashes), ngram),
        )
    ]
    for length in range(short_ngram, ngram):
        short = np.flatnonzero(words.counts == length)
        starts = words.offsets[short]
        hashes = _run_hashes(words.hashes, starts, length)
        parts.append(_Runs(hashes, owners[short], starts, np.full(len(short), length)))
    names = [field.name for field in dataclasses.fields(_Runs)]
    return _Runs(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _own_runs(
    runs: _Runs, words: Words, leaves: np.ndarray, ngram: int
) -> tuple[_Runs, np.ndarray]:
    """Each run once, sorted by hash, with its first item; and all items that have one of them.

    Runs that are no item's own are left out.
    """
    runs = runs.take(np.lexsort((runs.owners, runs.hashes)))
    new = np.append(True, runs.hashes[1:] != runs.hashes[:-1])[: len(runs.hashes)]
    begins = np.flatnonzero(new)
    firsts = runs.take(begins)
    other = new.copy()
    other[1:] |= runs.owners[1:] != runs.owners[:-1]
    items = np.add.reduceat(other.astype(np.int64), begins) if len(begins) else begins
    most = np.clip(np.bincount(leaves)[leaves[firsts.owners]] // 2, 1, _MOST_ITEMS)
    most[firsts.lengths < ngram] = 1
    keep = (items <= most) & (4 * _different_words(words, firsts) > firsts.lengths)
    everywhere = np.repeat(keep, np.diff(np.append(begins, len(new))))
    return firsts.take(keep), np.unique(runs.owners[everywhere])


def _different_words(words: Words, runs: _Runs) -> np.ndarray:
    """How many different words each run has."""
    counts = np.zeros(len(runs.starts), np.int64)
    for length in np.unique(runs.lengths):
        which = np.flatnonzero(runs.lengths == length)
        for part in np.array_split(which, len(which) // _ROWS_AT_ONCE + 1):
            windows = np.sort(words.hashes[runs.starts[part][:, None] + np.arange(length)], axis=1)
            counts[part] = 1 + np.count_nonzero(np.diff(windows, axis=1), axis=1)
    return counts


# --- looking up -------------------------------------------------------------------------------


class _Table:
    """Sorted hashes, and a bitmap that rules most others out before the binary search."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        bits = max(3, int(len(values) * _SLOTS_PER_KEY).bit_length())
        self._shift = np.uint64(64 - bits)
        self._bitmap = np.zeros(2**bits, bool)
        self._bitmap[values >> self._shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in `hashes` of those that are here, ascending, and where they are here."""
        maybe = np.flatnonzero(self._bitmap[hashes >> self._shift])
        places = np.searchsorted(self._values, hashes[maybe])
        places[places == len(self._values)] = 0
        there = self._values[places] == hashes[maybe] if len(maybe) else np.zeros(0, bool)
        return maybe[there], places[there]


def _run_hashes(hashes: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Hashes of the runs of `length` words that begin at `starts`."""
    runs = hashes[(starts[:, None] + np.arange(length)).ravel()]
    return ngram_hashes(Words(runs, np.arange(len(starts) + 1) * length), length).hashes


def _text_at(offsets: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The text in which each position lies."""
    return np.searchsorted(offsets, positions, side="right") - 1
