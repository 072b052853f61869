"""C4's rules for lines and pages: Raffel et al. 2020, arXiv:1910.10683, section 2.2.

Bounds, order and phrases are those of the code that made C4 (tensorflow_datasets,
`text/c4_utils.py`, `clean_page`); its bounds on words and sentences are those of the paper's
arXiv text (5 words a line, 3 sentences a page). As in that code the page rules look only at lines
that were not removed before. Left out is the list of bad words.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from posttrain.data.operations.base import Drop
from posttrain.data.operations.quality_text import Page

# "only retained lines that ended in a terminal punctuation mark (i.e. a period, exclamation mark,
# question mark, or end quotation mark)"; the code adds: but not in an ellipsis.
END_MARKS = frozenset(".!?\"'\u201d\u2019")
ELLIPSIS = "..."
# "discarded any page with fewer than 3 sentences and only retained lines that contained at least
# 5 words"
MIN_SENTENCES = 3
MIN_WORDS_PER_LINE = 5
# Not in the paper; `_MAX_WORD_LENGTH` of the code.
MAX_WORD_LENGTH = 1000
# "removed any page where the phrase 'lorem ipsum' appeared"
PLACEHOLDER = "lorem ipsum"
# "removed any pages that contained a curly bracket"
CURLY_BRACKET = "{"
# "removed any line with the word Javascript"
JAVASCRIPT = "javascript"
# "to remove boilerplate policy notices, removed any lines containing the strings ..."
POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
# "citation markers (e.g. [1], [citation needed], etc.). We removed any such markers"
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")

# A sentence ends at a mark before white space, unless a small letter follows or the mark belongs
# to an initial or a title.
_SENTENCE_END = re.compile(
    r"""[.!?](?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr|St)\.)(?<!\bMrs\.)["'\u201d\u2019)\]]*\s+(?![a-z])"""
)


@dataclass(frozen=True)
class Cleaned:
    """A page that C4 keeps."""

    page: Page
    """As it goes on; the page that came where nothing was removed."""
    removed: Counter[str] = field(default_factory=Counter)
    """Lines removed, by rule."""
    citations: int = 0
    """Citation markers removed."""

    @property
    def changed(self) -> bool:
        """Whether anything was removed."""
        return bool(self.removed or self.citations)

    @property
    def detail(self) -> str:
        """What was removed, such as `3 lines, 1 citation marker removed`."""
        parts = [
            f"{count} {noun}{'' if count == 1 else 's'}"
            for count, noun in ((self.removed.total(), "line"), (self.citations, "citation marker"))
            if count
        ]
        return f"{', '.join(parts)} removed"


def c4(page: Page) -> Drop | Cleaned:
    """A page without the lines that C4 removes, or why C4 drops it."""
    low = page.text.lower()
    # Most pages have none of the phrases: one look at the page saves one at every line.
    phrases = [p for p in (PLACEHOLDER, CURLY_BRACKET, JAVASCRIPT, *POLICY) if p in low]
    has_citation = "[" in low and CITATION.search(page.text) is not None
    kept: list[str] = []
    parts: list[str] = []
    removed: Counter[str] = Counter()
    citations, blank = 0, False
    for raw in page.raw_lines:
        line = raw.strip()
        if not line:
            blank = True
            continue
        found = 0
        if has_citation and not _has_long_word(line):
            line, found = CITATION.subn("", line)
        verdict = _line_verdict(line) or (_phrase_verdict(line, phrases) if phrases else None)
        if isinstance(verdict, Drop):
            return verdict
        if verdict:
            removed[verdict] += 1
            continue
        if parts:
            parts.append("\n\n" if blank else "\n")
        citations += found
        blank = False
        kept.append(line)
        parts.append(CITATION.sub("", raw) if found else raw)
    sentences = count_sentences(kept)
    if sentences < MIN_SENTENCES:
        left = f" in {len(kept)} lines that are left" if removed else ""
        return Drop(
            "c4: too few sentences", f"{sentences} sentences{left}; at least {MIN_SENTENCES}"
        )
    if not removed and not citations:
        return Cleaned(page)
    return Cleaned(Page("".join(parts)), removed, citations)


def count_sentences(lines: list[str]) -> int:
    """Sentences of lines that each end with one; exact only below C4's bound."""
    if len(lines) >= MIN_SENTENCES:
        return len(lines)
    return len(lines) + sum(len(_SENTENCE_END.findall(line)) for line in lines)


def _line_verdict(line: str) -> str | None:
    """Why C4 removes a line for its form."""
    if _has_long_word(line):
        return "c4: lines with a word too long"
    if line[-1:] not in END_MARKS or line.endswith(ELLIPSIS):
        return "c4: lines without end punctuation"
    if len(line.split(None, MIN_WORDS_PER_LINE - 1)) < MIN_WORDS_PER_LINE:
        return "c4: lines with too few words"
    return None


def _phrase_verdict(line: str, phrases: list[str]) -> Drop | str | None:
    """Why C4 drops the page for a line, or removes the line, for what it says."""
    low = line.lower()
    found = [phrase for phrase in phrases if phrase in low]
    if PLACEHOLDER in found:
        return Drop("c4: lorem ipsum")
    if JAVASCRIPT in found:
        return "c4: lines about javascript"
    if CURLY_BRACKET in found:
        return Drop("c4: curly bracket")
    return "c4: policy lines" if found else None


def _has_long_word(line: str) -> bool:
    return len(line) > MAX_WORD_LENGTH and any(len(word) > MAX_WORD_LENGTH for word in line.split())
