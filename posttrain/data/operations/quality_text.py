"""What the rules for documents look at: lines, paragraphs, and counts of words.

A word is what stands between white space, as `str.split` cuts. The counting loops are numba
kernels over Arrow's UTF-8 buffers (`quality_compiled.py`). Where numba does not work
(`kernels.use_numba`) slower code in Python gives equal results.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import numpy as np

from posttrain.data import kernels

SPACE, LETTER = 1, 2
"""Classes of code points: `str.isspace`, `str.isalpha`; everything else is 0."""


@dataclass(frozen=True)
class Page:
    """A document with its lines."""

    text: str

    @cached_property
    def raw_lines(self) -> list[str]:
        """Its lines as they are, blank ones too."""
        return self.text.splitlines()

    @cached_property
    def lines(self) -> list[str]:
        """Its lines without white space around them; none is blank."""
        return [line for raw in self.raw_lines if (line := raw.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Its runs of lines between blank lines."""
        if len(self.lines) == len(self.raw_lines):
            return ["\n".join(self.lines)] if self.lines else []
        paragraphs: list[list[str]] = [[]]
        for raw in self.raw_lines:
            if line := raw.strip():
                paragraphs[-1].append(line)
            elif paragraphs[-1]:
                paragraphs.append([])
        return ["\n".join(paragraph) for paragraph in paragraphs if paragraph]


@dataclass(frozen=True)
class WordCounts:
    """Counts over the words of one document."""

    words: int
    characters: int
    """Characters of all words together, without the white space between them."""
    with_letter: int
    """Words with at least one letter of any script (`str.isalpha`)."""


class Utf8Texts:
    """Texts as one buffer of UTF-8 bytes: what the kernels read."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Encode the texts; a text with a lone surrogate is not UTF-8 and is refused by Arrow."""
        import pyarrow as pa

        self.texts = texts
        _, offsets, data = pa.array(texts, pa.large_string()).buffers()
        # Always read-only, and never without memory: other arrays would be compiled for anew.
        self.data = np.frombuffer(data if data and data.size else b"\0", np.uint8)
        self.offsets = np.frombuffer(offsets if texts else bytes(8), np.int64)[: len(texts) + 1]

    @cached_property
    def counts(self) -> list[WordCounts]:
        """Word counts of every text."""
        if not kernels.use_numba():
            return [count_words(text) for text in self.texts]
        out = np.zeros((3, len(self.texts)), np.int64)
        compiled().count_words(self.data, self.offsets, character_classes(), out)
        return [WordCounts(*values) for values in out.T.tolist()]


def count_words(text: str) -> WordCounts:
    """Word counts of one text, in plain Python."""
    words = text.split()
    with_letter = sum(word.isalpha() or any(map(str.isalpha, word)) for word in words)
    return WordCounts(len(words), sum(map(len, words)), with_letter)


@functools.cache
def character_classes() -> np.ndarray:
    """The class of every code point, uint8."""
    points = np.arange(0x110000, dtype=np.uint32)
    characters = points.view("=U1")
    classes = np.zeros(len(points), np.uint8)
    classes[np.strings.isspace(characters)] = SPACE
    classes[np.strings.isalpha(characters)] = LETTER
    return classes


def compiled() -> ModuleType:
    """The compiled loops; importing numba takes half a second, so late."""
    return importlib.import_module("posttrain.data.operations.quality_compiled")
