"""MinHash signatures over word 5-grams, and the band keys that similar texts are likely to share.

With b bands of r rows, two texts of Jaccard similarity s share a band key with probability
1 - (1 - s**r)**b (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, section 3.4): at
s = 0.8 that is 0.9999 for 32x4 and 0.95 for 16x8. Band keys only propose candidates; whether two
texts are near duplicates is decided by their exact similarity.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data import kernels
from posttrain.data.words import Words, hash_words, ngram_hashes

if TYPE_CHECKING:
    import pyarrow as pa

NGRAM = 5
"""Words of a shingle."""
PERMUTATIONS = 128
_SEED = 20_240_229
_CHUNK = 2_000_000
"""Values held at a time by the numpy version: n-grams times permutations of a block."""


@dataclass(frozen=True)
class Sketch:
    """What near-duplicate search remembers of several texts."""

    keys: np.ndarray
    """Band keys: uint64 of shape (bands, texts)."""
    words: np.ndarray
    """int64; words a text."""
    ties: np.ndarray
    """uint64; one number a text that only depends on its words, to break ties by content."""


def sketch(texts: Sequence[str] | pa.Array, bands: int) -> Sketch:
    """Sketch texts; about 10 microseconds for 190 words."""
    grams, words = shingles(texts)
    ties = np.zeros(0, np.uint64)
    if len(words):  # every text has a shingle, so no stretch is empty
        ties = kernels.mix_array(np.add.reduceat(grams.hashes, grams.offsets[:-1]))
    return Sketch(band_keys(signatures(grams), bands), words, ties)


def shingles(texts: Sequence[str] | pa.Array) -> tuple[Words, np.ndarray]:
    """Hashes of each text's word 5-grams, repeated ones as often as they occur, and word counts.

    A text of fewer than five words is one shingle, the hash of all of it, so that it equals only
    a text of the same words; one without any word is the hash of its characters.
    """
    words = hash_words(texts)
    grams = ngram_hashes(words, NGRAM)
    short = np.flatnonzero(grams.counts == 0)
    if not len(short):
        return grams, words.counts
    # Put in one place of their own, where the empty stretches of the short texts are.
    extra = np.array([_whole(texts, words, int(text)) for text in short], np.uint64)
    hashes = np.insert(grams.hashes, grams.offsets[short], extra)
    counts = grams.counts.copy()
    counts[short] = 1
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return Words(hashes, offsets), words.counts


def signatures(grams: Words) -> np.ndarray:
    """MinHash signatures: uint32 of shape (texts, 128).

    The permutations are `a * x + b` modulo 2**32 with odd `a` over 32 bits of the gram's hash.
    """
    a, b = _permutations()
    if kernels.use_numba():
        return kernels.minhash(grams.hashes, grams.offsets, a, b)
    out = np.empty((len(grams.offsets) - 1, PERMUTATIONS), np.uint32)
    values = (grams.hashes >> np.uint64(32)).astype(np.uint32)
    step = max(1, _CHUNK // PERMUTATIONS)
    first = 0
    while first < len(out):
        # As many whole texts as fit into the block, at least one.
        last = int(np.searchsorted(grams.offsets, grams.offsets[first] + step, "right")) - 1
        last = min(max(last, first + 1), len(out))
        begin, end = grams.offsets[first], grams.offsets[last]
        permuted = a[:, None] * values[None, begin:end] + b[:, None]
        starts = grams.offsets[first:last] - begin
        out[first:last] = np.minimum.reduceat(permuted, starts, axis=1).T
        first = last
    return out


def band_keys(signature: np.ndarray, bands: int) -> np.ndarray:
    """One key a band: uint64 of shape (bands, texts). Keys of different bands are unrelated."""
    texts, permutations = signature.shape
    rows = permutations // bands
    parts = signature.reshape(texts, bands, rows).astype(np.uint64)
    keys = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), (texts, bands)).copy()
    for row in range(rows):
        keys = kernels.mix_array(keys * kernels.GRAM_BASE + parts[:, :, row])
    return np.ascontiguousarray(keys.T)


def shingle_sets(texts: Sequence[str] | pa.Array) -> Words:
    """The distinct shingles of each text, sorted: what exact Jaccard similarity is computed on."""
    grams, _ = shingles(texts)
    if kernels.use_numba():
        return Words(*kernels.distinct_sorted(grams.hashes, grams.offsets))
    sets = [
        np.unique(grams.hashes[first:last])
        for first, last in zip(grams.offsets[:-1], grams.offsets[1:], strict=True)
    ]
    sizes = np.array([len(one) for one in sets], np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return Words(np.concatenate(sets) if sets else np.zeros(0, np.uint64), offsets)


def jaccard(sets: Words, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Exact Jaccard similarity of pairs of texts, given by their positions in `sets`."""
    if kernels.use_numba():
        return kernels.jaccard(sets.hashes, sets.offsets, left, right)
    out = np.empty(len(left), np.float64)
    for pair, (i, j) in enumerate(zip(left, right, strict=True)):
        one = sets.hashes[sets.offsets[i] : sets.offsets[i + 1]]
        other = sets.hashes[sets.offsets[j] : sets.offsets[j + 1]]
        common = len(np.intersect1d(one, other, assume_unique=True))
        out[pair] = common / (len(one) + len(other) - common)
    return out


def _whole(texts: Sequence[str] | pa.Array, words: Words, text: int) -> np.uint64:
    own = words.hashes[words.offsets[text] : words.offsets[text + 1]]
    # The salts keep a short text from equalling a 5-gram or a text without words.
    data = b"words\0" + own.tobytes()
    if not len(own):
        characters = texts[text] if isinstance(texts[text], str) else texts[text].as_py()  # type: ignore[union-attr]
        data = b"characters\0" + " ".join(characters.split()).encode()
    return np.uint64(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()))


@functools.cache
def _permutations() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(_SEED)
    a = generator.integers(0, 2**31, PERMUTATIONS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return a, generator.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32)
