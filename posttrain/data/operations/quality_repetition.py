"""Gopher's repetition rules: Rae et al. 2021, arXiv:2112.11446, appendix A1.1, table A1.

What the paper leaves open is decided as datatrove does. Of equal lines, paragraphs and n-grams the
first counts as no repetition. The characters of the most frequent n-gram are its length with the
spaces between its words, times its occurrences. Duplicate n-grams are found from left to right,
and one found ends where the next may begin, so that no character counts twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from posttrain.data import kernels
from posttrain.data.operations.base import Drop
from posttrain.data.operations.quality_text import Page, Utf8Texts, character_classes, compiled

# Table A1, from the top. Each is the largest share that is kept.
MAX_DUPLICATE_LINES = 0.30
MAX_DUPLICATE_PARAGRAPHS = 0.30
MAX_CHARACTERS_IN_DUPLICATE_LINES = 0.20
MAX_CHARACTERS_IN_DUPLICATE_PARAGRAPHS = 0.20
MAX_CHARACTERS_IN_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_CHARACTERS_IN_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

_NGRAM_RULES = [
    *((f"top {n}-gram", bound) for n, bound in MAX_CHARACTERS_IN_TOP_NGRAM.items()),
    *((f"duplicate {n}-grams", bound) for n, bound in MAX_CHARACTERS_IN_DUPLICATE_NGRAMS.items()),
]
_LONGEST = 10


def repeated_lines(page: Page) -> Drop | None:
    """The first broken rule about lines and paragraphs."""
    lines, paragraphs = page.lines, page.paragraphs
    if len(set(lines)) == len(lines):
        return None  # and so no paragraph repeats either
    line_count, line_characters = duplicates(lines)
    paragraph_count, paragraph_characters = duplicates(paragraphs)
    size = len(page.text)
    return (
        _above("duplicate lines", line_count, len(lines), MAX_DUPLICATE_LINES, "lines")
        or _above(
            "duplicate paragraphs",
            paragraph_count,
            len(paragraphs),
            MAX_DUPLICATE_PARAGRAPHS,
            "paragraphs",
        )
        or _above(
            "characters in duplicate lines",
            line_characters,
            size,
            MAX_CHARACTERS_IN_DUPLICATE_LINES,
        )
        or _above(
            "characters in duplicate paragraphs",
            paragraph_characters,
            size,
            MAX_CHARACTERS_IN_DUPLICATE_PARAGRAPHS,
        )
    )


def repeated_ngrams(utf8: Utf8Texts, selected: Sequence[int]) -> dict[int, Drop]:
    """The first broken rule about n-grams, by position, of those selected that break one."""
    drops: dict[int, Drop] = {}
    for position, repeated in zip(selected, ngram_characters(utf8, selected), strict=True):
        size = len(utf8.texts[position])
        for (what, bound), characters in zip(_NGRAM_RULES, repeated, strict=True):
            if drop := _above(what, characters, size, bound):
                drops[position] = drop
                break
    return drops


def ngram_characters(utf8: Utf8Texts, selected: Sequence[int]) -> list[list[int]]:
    """Characters in repeated n-grams of each selected text, for n of 2 to 10.

    For n up to 4 they are those of the most frequent n-gram, beyond those of all duplicates.
    """
    if not len(selected):
        return []
    if not kernels.use_numba():
        return [ngram_characters_of(utf8.texts[position]) for position in selected]
    out = np.zeros((len(selected), len(_NGRAM_RULES)), np.int64)
    most_words = max(utf8.counts[position].words for position in selected)
    compiled().repeated_characters(
        utf8.data,
        utf8.offsets,
        character_classes(),
        np.asarray(selected, np.int64),
        most_words,
        out,
    )
    return [[int(value) for value in row] for row in out.tolist()]


def ngram_characters_of(text: str) -> list[int]:
    """The same of one text, in plain Python."""
    words = text.split()
    top = [_top_ngram(words, n) for n in MAX_CHARACTERS_IN_TOP_NGRAM]
    return top + [_duplicate_ngrams(words, n) for n in MAX_CHARACTERS_IN_DUPLICATE_NGRAMS]


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts repeat one before them, and their characters."""
    counts = Counter(parts)
    repeats = len(parts) - len(counts)
    return repeats, sum((count - 1) * len(part) for part, count in counts.items() if count > 1)


def _top_ngram(words: list[str], n: int) -> int:
    counts = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    # Of equally frequent ones the first in the text: `most_common` keeps their order.
    ((ngram, count),) = counts.most_common(1) or [("", 0)]
    return len(ngram) * count if count > 1 else 0


def _duplicate_ngrams(words: list[str], n: int) -> int:
    seen: set[tuple[str, ...]] = set()
    characters, i = 0, 0
    while i <= len(words) - n:
        ngram = tuple(words[i : i + n])
        if ngram in seen:
            characters += sum(map(len, ngram))
            i += n
        else:
            seen.add(ngram)
            i += 1
    return characters


def _above(what: str, part: int, whole: int, bound: float, unit: str = "characters") -> Drop | None:
    if not part or part / whole <= bound:
        return None
    detail = f"{min(part / whole, 1):.1%} of {unit}; at most {bound:.0%}"
    return Drop(f"gopher repetition: {what}", detail)
