"""The loops over characters and n-grams that numba compiles.

Compiled code is cached on disk, so only the first run on a machine compiles. Nothing here holds
Python's global lock.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint32, uint64

from posttrain.data.compiled import mix
from posttrain.data.kernels import GRAM_BASE, LETTER_BASE
from posttrain.data.operations.quality_text import LETTER, SPACE


@njit(cache=True, nogil=True)
def decode(data, at):
    """The code point at a byte of valid UTF-8, and where the next one begins."""
    byte = uint32(data[at])
    if byte < 0x80:
        return byte, at + 1
    if byte < 0xE0:
        return ((byte & 0x1F) << 6) | (data[at + 1] & 0x3F), at + 2
    point = (data[at + 1] & 0x3F) << 6 | (data[at + 2] & 0x3F)
    if byte < 0xF0:
        return ((byte & 0x0F) << 12) | point, at + 3
    return ((byte & 0x07) << 18) | (point << 6) | (data[at + 3] & 0x3F), at + 4


@njit(cache=True, nogil=True)
def count_words(data, offsets, classes, out):
    """Words, their characters, and words with a letter, one column a text."""
    for text in range(len(offsets) - 1):
        at, end = offsets[text], offsets[text + 1]
        inside, lettered = False, False
        words, characters, with_letter = 0, 0, 0
        while at < end:
            point, at = decode(data, at)
            kind = classes[point]
            if kind == SPACE:
                inside = False
                continue
            if not inside:
                inside, lettered = True, False
                words += 1
            characters += 1
            if kind == LETTER and not lettered:
                lettered = True
                with_letter += 1
        out[0, text], out[1, text], out[2, text] = words, characters, with_letter


@njit(cache=True, nogil=True)
def cut_words(data, at, end, classes, hashes, ends):
    """Hash of every word, and characters of all words up to each; returns how many words."""
    count, characters = 0, 0
    value, inside = uint64(0), False
    while at < end:
        point, at = decode(data, at)
        if classes[point] == SPACE:
            if inside:
                hashes[count] = mix(value)
                count += 1
                ends[count] = characters
            value, inside = uint64(0), False
        else:
            value = value * LETTER_BASE + uint64(point) + uint64(1)
            characters += 1
            inside = True
    if inside:
        hashes[count] = mix(value)
        count += 1
        ends[count] = characters
    return count


@njit(cache=True, nogil=True)
def count_grams(n, words, hashes, grams, places, table):
    """Count the n-grams that may repeat; returns whether one does.

    `places` holds for each position its (n-1)-gram's place in the table, or -1 where that occurs
    once: an n-gram can only repeat where both (n-1)-grams in it do. It then holds the same for n.
    """
    keys, counts, used = table
    size = 4
    while size < 2 * words:
        size *= 2
    mask = uint64(size - 1)
    for slot in range(size):
        used[slot] = False
    total, repeats = words - n + 1, False
    for i in range(total):
        if n > 1:
            if places[i] < 0 or places[i + 1] < 0:
                places[i] = -1
                continue
            grams[i] = mix(grams[i] * GRAM_BASE + hashes[i + n - 1])
        slot = grams[i] & mask
        while used[slot] and keys[slot] != grams[i]:
            slot = (slot + uint64(1)) & mask
        if used[slot]:
            counts[slot] += 1
            repeats = True
        else:
            used[slot], keys[slot], counts[slot] = True, grams[i], 1
        places[i] = slot
    for i in range(total):
        if places[i] >= 0 and counts[places[i]] == 1:
            places[i] = -1
    return repeats


@njit(cache=True, nogil=True)
def top_gram(n, total, places, counts, ends):
    """Characters of the most frequent n-gram, spaces included, times how often it occurs."""
    most, characters = 1, 0
    for i in range(total):
        if places[i] >= 0 and counts[places[i]] > most:
            most = counts[places[i]]
            characters = most * (ends[i + n] - ends[i] + n - 1)
    return characters


@njit(cache=True, nogil=True)
def duplicate_grams(n, total, places, counts, ends):
    """Characters of n-grams that occurred before, from left to right; none is counted twice."""
    characters, i = 0, 0
    while i < total:
        if places[i] >= 0:
            if counts[places[i]] == 0:
                characters += ends[i + n] - ends[i]
                i += n
                continue
            counts[places[i]] = 0  # from now on it has been seen
        i += 1
    return characters


@njit(cache=True, nogil=True)
def repeated_characters(data, offsets, classes, selected, most_words, out):
    """Repeated characters of the selected texts, one row a text, one column for each n of 2..10."""
    hashes, grams = np.empty(most_words, np.uint64), np.empty(most_words, np.uint64)
    places, ends = np.empty(most_words, np.int64), np.zeros(most_words + 1, np.int64)
    size = 4
    while size < 2 * most_words:
        size *= 2
    counts = np.empty(size, np.int64)
    table = (np.empty(size, np.uint64), counts, np.empty(size, np.bool_))
    for row in range(len(selected)):
        start, end = offsets[selected[row]], offsets[selected[row] + 1]
        words = cut_words(data, start, end, classes, hashes, ends)
        grams[:words] = hashes[:words]
        for n in range(1, min(words, 10) + 1):
            if not count_grams(n, words, hashes, grams, places, table):
                break
            if 2 <= n <= 4:
                out[row, n - 2] = top_gram(n, words - n + 1, places, counts, ends)
            elif n >= 5:
                out[row, n - 2] = duplicate_grams(n, words - n + 1, places, counts, ends)
