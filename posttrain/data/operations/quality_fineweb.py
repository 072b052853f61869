"""FineWeb's own rules: Penedo et al. 2024, arXiv:2406.17557, section 3.6.

The three filters that the paper's ablations chose, with the bounds of its text; a document on a
bound goes. Lines are those that are not blank, without white space around them.
"""

from __future__ import annotations

from posttrain.data.operations.base import Drop
from posttrain.data.operations.quality_c4 import END_MARKS as C4_END_MARKS
from posttrain.data.operations.quality_repetition import duplicates
from posttrain.data.operations.quality_text import Page

# "where the fraction of lines ending with punctuation is <= 0.12"
MIN_LINES_WITH_END_MARK = 0.12
# "where the fraction of characters in duplicated lines is >= 0.1"
MAX_CHARACTERS_IN_DUPLICATE_LINES = 0.1
# "where the fraction of lines shorter than 30 characters is >= 0.67"
MAX_SHORT_LINES = 0.67
SHORT_LINE = 30

END_MARKS = C4_END_MARKS | set("\u3002\uff01\uff1f")  # their full-width forms, as in Chinese


def fineweb(page: Page) -> Drop | None:
    """The first of the rules that a document breaks."""
    lines = page.lines
    if not lines:
        return Drop("fineweb: no text")
    ended = sum(line[-1] in END_MARKS for line in lines) / len(lines)
    if ended <= MIN_LINES_WITH_END_MARK:
        detail = f"{ended:.1%} of lines; more than {MIN_LINES_WITH_END_MARK:.0%}"
        return Drop("fineweb: too few lines end with punctuation", detail)
    _, characters = duplicates(lines)
    repeated = characters / sum(map(len, lines))
    if repeated >= MAX_CHARACTERS_IN_DUPLICATE_LINES:
        bound = f"less than {MAX_CHARACTERS_IN_DUPLICATE_LINES:.0%}"
        return Drop(
            "fineweb: characters in duplicate lines", f"{repeated:.1%} of characters; {bound}"
        )
    short = sum(len(line) < SHORT_LINE for line in lines) / len(lines)
    if short >= MAX_SHORT_LINES:
        detail = f"{short:.1%} of lines; less than {MAX_SHORT_LINES:.0%}"
        return Drop("fineweb: too many short lines", detail)
    return None
