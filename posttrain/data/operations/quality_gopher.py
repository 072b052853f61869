"""Gopher's quality rules: Rae et al. 2021, arXiv:2112.11446, appendix A1.1, "Quality Filtering".

The paper removes a document that breaks any of them. What it leaves open is decided thus: a word
is what stands between white space; the ellipsis is `...` or `…`; a line is one that is not blank;
stop words count in any case and without the punctuation around them.
"""

from __future__ import annotations

import re

from posttrain.data.operations.base import Drop
from posttrain.data.operations.quality_text import Page, WordCounts

# "does not contain between 50 and 100,000 words"
MIN_WORDS = 50
MAX_WORDS = 100_000
# "whose mean word length is outside the range of 3 to 10 characters"
MIN_MEAN_WORD_LENGTH = 3
MAX_MEAN_WORD_LENGTH = 10
# "a symbol-to-word ratio greater than 0.1 for either the hash symbol or the ellipsis"
MAX_SYMBOLS_PER_WORD = 0.1
# "more than 90% of lines starting with a bullet point"
MAX_BULLET_LINES = 0.9
# "or more than 30% ending with an ellipsis"
MAX_ELLIPSIS_LINES = 0.3
# "80% of words in a document contain at least one alphabetic character"
MIN_WORDS_WITH_LETTER = 0.8
# "at least two of the following English words: the, be, to, of, and, that, have, with"
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
MIN_STOP_WORDS = 2

BULLETS = ("•", "-", "* ", "‣", "◦", "●", "▪")
ELLIPSES = ("...", "…")

_STOP_WORD = re.compile(rf"\b(?:{'|'.join(STOP_WORDS)})\b", re.IGNORECASE)


def gopher_quality(page: Page, counts: WordCounts) -> Drop | None:
    """The first of the rules that a document breaks."""
    return (
        _word_rules(counts)
        or _symbol_rules(page, counts)
        or _line_rules(page)
        or _language_rules(page, counts)
    )


def _word_rules(counts: WordCounts) -> Drop | None:
    if counts.words < MIN_WORDS:
        return Drop("gopher: too few words", f"{counts.words} words; at least {MIN_WORDS}")
    if counts.words > MAX_WORDS:
        return Drop("gopher: too many words", f"{counts.words} words; at most {MAX_WORDS}")
    mean = counts.characters / counts.words
    if mean < MIN_MEAN_WORD_LENGTH:
        return Drop(
            "gopher: words too short",
            f"{mean:.2f} characters a word; at least {MIN_MEAN_WORD_LENGTH}",
        )
    if mean > MAX_MEAN_WORD_LENGTH:
        return Drop(
            "gopher: words too long",
            f"{mean:.2f} characters a word; at most {MAX_MEAN_WORD_LENGTH}",
        )
    return None


def _symbol_rules(page: Page, counts: WordCounts) -> Drop | None:
    hashes = page.text.count("#")
    if hashes / counts.words > MAX_SYMBOLS_PER_WORD:
        return Drop("gopher: too many hash symbols", _per_word(hashes, counts.words))
    ellipses = sum(map(page.text.count, ELLIPSES))
    if ellipses / counts.words > MAX_SYMBOLS_PER_WORD:
        return Drop("gopher: too many ellipses", _per_word(ellipses, counts.words))
    return None


def _line_rules(page: Page) -> Drop | None:
    lines = page.lines
    bullets = sum(line.startswith(BULLETS) for line in lines)
    if bullets / len(lines) > MAX_BULLET_LINES:
        share = f"{bullets / len(lines):.1%} of lines; at most {MAX_BULLET_LINES:.0%}"
        return Drop("gopher: too many bullet lines", share)
    ellipses = sum(line.endswith(ELLIPSES) for line in lines)
    if ellipses / len(lines) > MAX_ELLIPSIS_LINES:
        share = f"{ellipses / len(lines):.1%} of lines; at most {MAX_ELLIPSIS_LINES:.0%}"
        return Drop("gopher: too many lines end in an ellipsis", share)
    return None


def _language_rules(page: Page, counts: WordCounts) -> Drop | None:
    share = counts.with_letter / counts.words
    if share < MIN_WORDS_WITH_LETTER:
        return Drop(
            "gopher: too few words with a letter",
            f"{share:.1%} of words; at least {MIN_WORDS_WITH_LETTER:.0%}",
        )
    found: set[str] = set()
    for match in _STOP_WORD.finditer(page.text):
        found.add(match.group().lower())
        if len(found) >= MIN_STOP_WORDS:
            return None
    return Drop("gopher: too few stop words", f"{len(found)} stop words; at least {MIN_STOP_WORDS}")


def _per_word(symbols: int, words: int) -> str:
    return f"{symbols / words:.2f} a word; at most {MAX_SYMBOLS_PER_WORD}"
