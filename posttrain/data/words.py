r"""Texts as sequences of word hashes: what near-duplicate search and decontamination compare.

A word is what the regular expression `\w+` finds, in lower case and NFC; numbers stay as they are.
In texts mostly of scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer,
Burmese) every character of these scripts is a word, so that word n-grams are character n-grams.

A word's hash is a polynomial over its code points modulo 2**64, mixed; an n-gram's hash is a
polynomial over its words' hashes, mixed. There are two implementations with equal results: a numba
kernel, and numpy for machines on which numba does not work (`POSTTRAIN_NUMBA=0` forces it).
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data import kernels

if TYPE_CHECKING:
    import pyarrow as pa

# Ranges of scripts written without spaces between words (Unicode 16, Scripts.txt).
_UNSEGMENTED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana extensions
    (0x3400, 0x4DBF),  # CJK extension A
    (0x4E00, 0x9FFF),  # CJK
    (0xF900, 0xFAFF),  # CJK compatibility
    (0xFF66, 0xFF9D),  # half-width Katakana
)


@dataclass(frozen=True)
class Words:
    """Hashes of the words of several texts, one after the other."""

    hashes: np.ndarray
    """uint64, one a word."""
    offsets: np.ndarray
    """int64, one more than texts: text i has the words `hashes[offsets[i]:offsets[i + 1]]`."""

    @property
    def counts(self) -> np.ndarray:
        """Words a text."""
        return np.diff(self.offsets)


def hash_words(texts: Sequence[str] | pa.Array) -> Words:
    """Cut texts into words and hash them.

    Args:
        texts: Strings, or an Arrow array of them without nulls.
    """
    data, offsets = utf8_buffers(texts)
    classes, lower = _tables()
    if kernels.use_numba():
        hashes, ends = kernels.hash_words(data, offsets, classes, lower)
        return Words(hashes, ends)
    return _hash_words_numpy(data, offsets, classes, lower)


def ngram_hashes(words: Words, n: int) -> Words:
    """Hashes of all runs of `n` words, in order; a text of fewer words has none.

    Returns:
        The same structure, with an entry an n-gram in place of a word.
    """
    counts = np.maximum(words.counts - (n - 1), 0)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    if not len(words.hashes) or not offsets[-1]:
        return Words(np.zeros(0, np.uint64), offsets)
    if kernels.use_numba():
        return Words(kernels.ngrams(words.hashes, words.offsets, offsets, n), offsets)
    length = len(words.hashes) - n + 1
    power, sums = 1, np.zeros(length, np.uint64)
    for k in range(n):
        sums += words.hashes[k : k + length] * np.uint64(power)
        power = power * int(kernels.GRAM_BASE) % 2**64
    # An n-gram starts at each of the first `count` words of a text and at no other.
    starts = np.repeat(words.offsets[:-1] - offsets[:-1], counts) + np.arange(offsets[-1])
    return Words(kernels.mix_array(sums[starts]), offsets)


def utf8_buffers(texts: Sequence[str] | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """NFC bytes of all texts one after the other (uint8), and where each begins and ends (int64).

    Arrow's buffers are used in place wherever the text is ASCII or in NFC already.
    """
    import pyarrow as pa

    array = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
    if array.type != pa.large_string():
        array = array.cast(pa.large_string())
    array = _in_nfc(array)
    _, offset_buffer, data_buffer = array.buffers()
    if len(array) == 0 or data_buffer is None:
        return np.zeros(0, np.uint8), np.zeros(len(array) + 1, np.int64)
    offsets = np.frombuffer(offset_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    return np.frombuffer(data_buffer, np.uint8), offsets


def _in_nfc(array: pa.Array) -> pa.Array:
    """The texts in NFC; mostly they are already, and ASCII always is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    other = np.flatnonzero(~pc.string_is_ascii(array).to_numpy(zero_copy_only=False).astype(bool))
    values = array.take(pa.array(other)).to_pylist()
    if all(unicodedata.is_normalized("NFC", value) for value in values):
        return array
    every = array.to_pylist()
    return pa.array([unicodedata.normalize("NFC", value) for value in every], pa.large_string())


def _hash_words_numpy(
    data: np.ndarray, offsets: np.ndarray, classes: np.ndarray, lower: np.ndarray
) -> Words:
    """The kernel's twin; a few times slower."""
    points, point_offsets = _code_points(data, offsets)
    in_table = points < kernels.TABLE_SIZE
    beyond = np.where(points < kernels.LAST_LETTER, kernels.ALONE, kernels.SEPARATOR)
    kind = np.where(in_table, classes[np.where(in_table, points, 0)], beyond)
    points = np.where(in_table, lower[np.where(in_table, points, 0)], points)
    texts = len(offsets) - 1
    text = np.repeat(np.arange(texts), np.diff(point_offsets))
    inside = kind != kernels.SEPARATOR
    alone = kind == kernels.ALONE
    letters = np.bincount(text[inside], minlength=texts)
    unsegmented = 2 * np.bincount(text[alone], minlength=texts) > letters
    alone &= unsegmented[text]
    begins = inside.copy()
    if len(kind):
        joined = inside[1:] & inside[:-1] & ~alone[1:] & ~alone[:-1]
        begins[1:] &= ~(joined & (text[1:] == text[:-1]))
    points, text, begins = points[inside], text[inside], begins[inside]
    starts = np.flatnonzero(begins)
    if not len(starts):
        return Words(np.zeros(0, np.uint64), np.zeros(texts + 1, np.int64))
    lengths = np.diff(np.append(starts, len(points)))
    place = np.arange(len(points)) - np.repeat(starts, lengths)
    powers = np.ones(int(lengths.max()), np.uint64)
    powers[1:] = kernels.LETTER_BASE
    powers = np.cumprod(powers, dtype=np.uint64)
    sums = np.add.reduceat((points.astype(np.uint64) + np.uint64(1)) * powers[place], starts)
    counts = np.bincount(text[starts], minlength=texts)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return Words(kernels.mix_array(sums), ends)


def _code_points(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unicode code points of all texts, and where each text's begin."""
    whole = data[offsets[0] : offsets[-1]]
    points = np.frombuffer(whole.tobytes().decode().encode("utf-32-le"), np.uint32)
    # A code point has one byte that does not continue another.
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum((whole & 0xC0) != 0x80)])
    return points.astype(np.int64), first[offsets - offsets[0]]


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Of every code point below the table's size: its class (uint8), its lower case (uint32)."""
    classes = np.zeros(kernels.TABLE_SIZE, np.uint8)
    lower = np.arange(kernels.TABLE_SIZE, dtype=np.uint32)
    unsegmented = {point for first, last in _UNSEGMENTED for point in range(first, last + 1)}
    for point in range(min(kernels.TABLE_SIZE, sys.maxunicode)):
        character = chr(point)
        if character.isalnum() or character == "_":
            classes[point] = kernels.ALONE if point in unsegmented else kernels.LETTER
            small = character.lower()
            if len(small) == 1:
                lower[point] = ord(small)
    return classes, lower
