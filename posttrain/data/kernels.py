"""The inner loops of the data stage: words, n-grams, MinHash, set intersection.

The loops themselves stand in `compiled.py`, which numba compiles when one is first called; here
are their arguments and results. Each has a twin in numpy with equal results (`words.py`,
`minhash.py`), and tests hold the two side by side.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import numpy as np

SEPARATOR, LETTER, ALONE = 0, 1, 2
"""Classes of code points: between words, part of a word, of a script without spaces."""

LETTER_BASE = np.uint64(0x9E3779B97F4A7C15)
GRAM_BASE = np.uint64(0xD1342543DE82EF95)
MIX1 = np.uint64(0xBF58476D1CE4E5B9)
MIX2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)

TABLE_SIZE = 0x20000
"""Code points with a table entry."""
LAST_LETTER = 0x323B0
"""All letters from the table's end to here are ideographs (planes 2 and 3); none is beyond."""


def use_numba() -> bool:
    """Whether the kernels are compiled here; `POSTTRAIN_NUMBA=0` says no."""
    return os.environ.get("POSTTRAIN_NUMBA") != "0" and _compiles()


@functools.cache
def _compiles() -> bool:
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        return bool(_compiled().mix(np.uint64(1)))
    except Exception:  # numba raises whatever LLVM or the file system raise
        return False


def mix_array(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): spreads every bit over all of them."""
    values = values.astype(np.uint64, copy=True)
    values ^= values >> _S30
    values *= MIX1
    values ^= values >> _S27
    values *= MIX2
    values ^= values >> _S31
    return values


def hash_words(
    data: np.ndarray, offsets: np.ndarray, classes: np.ndarray, lower: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Word hashes of UTF-8 texts (uint64) and the offsets of each text's words (int64)."""
    size = int(offsets[-1] - offsets[0])
    out = np.empty(size // 2 + len(offsets), np.uint64)
    ends = np.zeros(len(offsets), np.int64)
    count = _compiled().hash_words(data, offsets, classes, lower, out, ends)
    return out[:count].copy(), ends


def ngrams(hashes: np.ndarray, offsets: np.ndarray, gram_offsets: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all n-grams; `gram_offsets` says where each text's begin."""
    out = np.empty(int(gram_offsets[-1]), np.uint64)
    _compiled().ngrams(hashes, offsets, gram_offsets, n, out)
    return out


def minhash(grams: np.ndarray, offsets: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """MinHash signatures, uint32 of shape (texts, permutations)."""
    out = np.empty((len(offsets) - 1, len(a)), np.uint32)
    _compiled().minhash(grams, offsets, a, b, out)
    return out


def jaccard(
    sets: np.ndarray, offsets: np.ndarray, left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Exact Jaccard similarity of pairs of sets, float64.

    Args:
        sets: Sorted, distinct uint64 elements of all sets, one set after the other.
        offsets: Where each set begins; one more than sets.
        left: Index of each pair's first set.
        right: Index of its second.
    """
    out = np.empty(len(left), np.float64)
    _compiled().jaccard(sets, offsets, left, right, out)
    return out


def distinct_sorted(grams: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each text's grams sorted and without repetition, and the new offsets."""
    out = grams.copy()
    ends = np.zeros(len(offsets), np.int64)
    count = _compiled().distinct_sorted(out, offsets, ends)
    return out[:count].copy(), ends


def _compiled() -> ModuleType:
    """The compiled loops; importing numba takes half a second, so late."""
    return importlib.import_module("posttrain.data.compiled")
