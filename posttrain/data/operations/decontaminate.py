"""Drops rows that share a run of words with an item of an evaluation set.

A row that holds an item teaches the answer, and the evaluation then measures memory. So no row may
share an n-gram of 13 words with an item; the length is that of GPT-3 (Brown et al. 2020,
arXiv:2005.14165, appendix C). Words are those of `posttrain.data.words`, so case, punctuation and
spacing do not matter. All turns of a row are read as one text, the system prompt included, so that
a question in one turn and its answer in the next are found together, and few-shot examples too.

What is looked for, and what is not:

- A text of at least `ngram` words: any n-gram of it.
- A shorter text, such as a quarter of MMLU's questions: the whole text, all its words in sequence,
  from `short_ngram` words on. Not any 8-gram: "which of the following is an example of a" and
  "between the United States and the Soviet Union" are some.
- A question of fewer than `short_ngram` words is not looked for alone, only together with its
  choices or its answer. `NgramIndex.too_short` counts these items.
- What says nothing about a single item is ignored: an n-gram that more than 10 items share, or
  more than half of the items of a small task (a prompt's template, "A. True, True B. False,
  False"); a short text that stands in two different items ("Which of the following statements is
  true?"); repetitions of few words, a quarter of the n-gram's at most ("0 0 0 0 1").

An item in which one word of every 13 is changed is not found.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from posttrain.data.batch import RowBatch
from posttrain.data.operations.base import Decisions, Drop
from posttrain.data.operations.ngram_index import NgramIndex, Shared
from posttrain.data.rows import Chat, Document, KtoExample, Messages, Preference, Row
from posttrain.data.words import hash_words
from posttrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DecontaminationFilter", "NgramIndex"]

_SHOWN_WORDS = 40
_WORD = re.compile(r"\w+")


class DecontaminationFilter:
    """Drops rows that share words with an item, with the reason `in <benchmark>`.

    The detail names the item's task, its number there, and the longest run of shared words in the
    row's own wording. `found` counts rows by benchmark; a row may count for several.
    """

    name: ClassVar[str] = "decontaminate"

    def __init__(self, index_path: Path, ngram: int, short_ngram: int) -> None:
        self.index_path = index_path
        self.ngram = ngram
        self.short_ngram = short_ngram

    def apply(self, batch: RowBatch) -> Decisions:
        """Look every row up.

        Raises:
            DataError: There is no index at the path, or it was built for other n-grams.
        """
        index = _open_index(self.index_path)
        if index.sizes != (self.ngram, self.short_ngram):
            raise DataError(
                f"decontaminate: {self.index_path} was built for n-grams of {index.sizes} words, "
                f"not {(self.ngram, self.short_ngram)}; build it again"
            )
        words = hash_words(_whole_texts(batch))
        shared = index.shared(words)
        decisions = Decisions(found=Counter(index.texts_by_benchmark(shared)))
        for row, start, length, item in zip(*_longest_runs(shared), strict=True):
            benchmark, leaf, number = index.place(item)
            quote = _quote(_text_of(batch, row), int(words.counts[row]), start, length)
            decisions.drops[row] = Drop(f"in {benchmark}", f'{leaf} item {number}: "{quote}"')
        return decisions


@functools.lru_cache(maxsize=2)
def _open_index(path: Path) -> NgramIndex:
    """A process opens an index once."""
    return NgramIndex.open(path)


def _longest_runs(shared: Shared) -> tuple[list[int], list[int], list[int], list[int]]:
    """Of each text with any: its number, and the longest run's first word, words and last item.

    Runs that overlap or touch are one.
    """
    if not len(shared.texts):
        return [], [], [], []
    # Each text's words are moved beyond those of the text before.
    begins = shared.starts + shared.texts * (int((shared.starts + shared.lengths).max()) + 1)
    ends = np.maximum.accumulate(begins + shared.lengths)
    firsts = np.flatnonzero(np.append(True, begins[1:] > ends[:-1]))
    lasts = np.append(firsts[1:], len(ends)) - 1
    lengths = ends[lasts] - begins[firsts]
    order = np.lexsort((-lengths, shared.texts[firsts]))
    texts, first_of_text = np.unique(shared.texts[firsts][order], return_index=True)
    longest = order[first_of_text]
    first, last = firsts[longest], lasts[longest]
    # Items that share a passage differ in the question behind it, so the run's end says which.
    columns = (texts, shared.starts[first], lengths[longest], shared.items[last])
    return tuple(column.tolist() for column in columns)


# --- texts ------------------------------------------------------------------------------------


def _whole_texts(batch: RowBatch) -> Sequence[str] | pa.Array:
    """What each row says, system prompts included."""
    if batch.family == "documents":
        return batch.arrow_texts
    return [_whole_text(row) for row in batch.rows]


def _text_of(batch: RowBatch, position: int) -> str:
    if batch.family == "documents":
        text: str = batch.table.column("text")[position].as_py()
        return text
    return _whole_text(batch.rows[position])


def _whole_text(row: Row) -> str:
    """All turns; a preference's prompt twice, so that each continuation stands after it."""
    match row:
        case Document():
            return row.text
        case Chat():
            return _joined(row.messages)
        case Preference():
            return _joined(row.prompt + row.chosen + row.prompt + row.rejected)
        case KtoExample():
            return _joined(row.prompt + row.completion)


def _joined(messages: Messages) -> str:
    return "\n\n".join(message.content for message in messages)


def _quote(text: str, count: int, start: int, length: int) -> str:
    """The words of a text from number `start` on, as they are written there.

    Args:
        text: The row's whole text.
        count: Words that `hash_words` finds in it.
        start: Number of the first word wanted.
        length: How many are wanted; of more than 40 the first 40 are given.
    """
    end = start + min(length, _SHOWN_WORDS)
    text = unicodedata.normalize("NFC", text)
    if text.isascii():
        words = list(itertools.islice(_WORD.finditer(text), start, end))
    else:
        words = _words(text, count)[start:end]
    quote = " ".join(text[words[0].start() : words[-1].end()].split())
    return quote if length <= _SHOWN_WORDS else f"{quote} ..."


def _words(text: str, count: int) -> list[re.Match[str]]:
    """The words of an NFC text, of which there are `count`."""
    words = list(_WORD.finditer(text))
    if len(words) == count:
        return words
    # A script without spaces: there a character is a word, which doubled makes two.
    letters = sorted({letter for word in words for letter in word.group()})
    doubled = hash_words([2 * letter for letter in letters]).counts
    alone = re.escape("".join(itertools.compress(letters, doubled == 2)))
    return list(re.finditer(rf"[{alone}]|[^\W{alone}]+", text))
