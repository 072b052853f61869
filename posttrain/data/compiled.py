"""The loops that numba compiles; see `kernels.py` for what goes in and comes out.

Compiled code is cached on disk, so only the first run on a machine compiles. Nothing here holds
Python's global lock.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint32, uint64

from posttrain.data.kernels import (
    GRAM_BASE,
    LAST_LETTER,
    LETTER_BASE,
    MIX1,
    MIX2,
    TABLE_SIZE,
)


@njit(cache=True, nogil=True)
def mix(value):
    """The finaliser of SplitMix64."""
    value = (value ^ (value >> uint64(30))) * MIX1
    value = (value ^ (value >> uint64(27))) * MIX2
    return value ^ (value >> uint64(31))


@njit(cache=True, nogil=True)
def hash_words(data, offsets, classes, lower, out, ends):
    """Decode UTF-8, cut into words, hash them; returns the number of words."""
    count = 0
    for text in range(len(offsets) - 1):
        begin, end = offsets[text], offsets[text + 1]
        words, letters, alone = _cut(data, begin, end, classes, lower, out, count, False)
        if 2 * alone > letters:
            words, letters, alone = _cut(data, begin, end, classes, lower, out, count, True)
        count += words
        ends[text + 1] = count
    return count


@njit(cache=True, nogil=True)
def _cut(data, at, end, classes, lower, out, count, split_alone):
    """Words of one text: how many, how many letters, how many of scripts without spaces."""
    first, letters, alone = count, 0, 0
    value, power, open_word = uint64(0), uint64(1), False
    while at < end:
        byte = uint32(data[at])
        if byte < 0x80:
            point, at = byte, at + 1
        elif byte < 0xE0:
            point, at = ((byte & 0x1F) << 6) | (data[at + 1] & 0x3F), at + 2
        elif byte < 0xF0:
            point = ((byte & 0x0F) << 12) | ((data[at + 1] & 0x3F) << 6)
            point, at = point | (data[at + 2] & 0x3F), at + 3
        else:
            point = ((byte & 0x07) << 18) | ((data[at + 1] & 0x3F) << 12)
            point = point | ((data[at + 2] & 0x3F) << 6) | (data[at + 3] & 0x3F)
            at += 4
        if point < TABLE_SIZE:
            kind, small = classes[point], lower[point]
        else:
            kind, small = (2 if point < LAST_LETTER else 0), point
        letters += kind > 0
        alone += kind == 2
        by_itself = kind == 2 and split_alone
        if open_word and (kind == 0 or by_itself):
            out[count] = mix(value)
            count += 1
            value, power, open_word = uint64(0), uint64(1), False
        if by_itself:
            out[count] = mix(uint64(small) + uint64(1))
            count += 1
        elif kind > 0:
            value += (uint64(small) + uint64(1)) * power
            power *= LETTER_BASE
            open_word = True
    if open_word:
        out[count] = mix(value)
        count += 1
    return count - first, letters, alone


@njit(cache=True, nogil=True)
def ngrams(hashes, offsets, gram_offsets, n, out):
    """Polynomial hash of every run of n word hashes."""
    for text in range(len(offsets) - 1):
        first, at = offsets[text], gram_offsets[text]
        for gram in range(gram_offsets[text + 1] - at):
            value, power = uint64(0), uint64(1)
            for k in range(n):
                value += hashes[first + gram + k] * power
                power *= GRAM_BASE
            out[at + gram] = mix(value)


@njit(cache=True, nogil=True)
def minhash(grams, offsets, a, b, out):
    """The least value of every permutation `a * x + b` modulo 2**32 over each text."""
    size = len(a)
    for text in range(len(offsets) - 1):
        row = out[text]
        for p in range(size):
            row[p] = uint32(0xFFFFFFFF)
        for gram in range(offsets[text], offsets[text + 1]):
            x = uint32(grams[gram] >> uint64(32))
            for p in range(size):
                value = uint32(a[p] * x + b[p])
                row[p] = min(row[p], value)


@njit(cache=True, nogil=True)
def jaccard(sets, offsets, left, right, out):
    """Intersection over union by merging sorted sets."""
    for pair in range(len(left)):
        i, i_end = offsets[left[pair]], offsets[left[pair] + 1]
        j, j_end = offsets[right[pair]], offsets[right[pair] + 1]
        total, common = (i_end - i) + (j_end - j), 0
        while i < i_end and j < j_end:
            x, y = sets[i], sets[j]
            common += x == y
            i += x <= y
            j += y <= x
        out[pair] = common / (total - common) if total > common else 0.0


@njit(cache=True, nogil=True)
def distinct_sorted(grams, offsets, ends):
    """Sort each text's grams in place and close the gaps; returns how many are left."""
    count = 0
    for text in range(len(offsets) - 1):
        start, end = offsets[text], offsets[text + 1]
        part = np.sort(grams[start:end])
        for k in range(end - start):
            if k == 0 or part[k] != part[k - 1]:
                grams[count] = part[k]
                count += 1
        ends[text + 1] = count
    return count
