"""`document_quality`: the published rules for web documents, as Gopher, C4 and FineWeb state them.

The four groups run in the order Gopher quality, Gopher repetition, C4, FineWeb, each on what the
one before it left, and the first rule that a document breaks is the reason of its drop. C4 edits:
it removes single lines and citation markers, and drops the page where fewer than three sentences
remain. The rules and their sources stand in `quality_gopher.py`, `quality_repetition.py`,
`quality_c4.py` and `quality_fineweb.py`. They were made for English web pages; a text in a
script without spaces between words has too few words for Gopher.

The reference is datatrove 0.10 (https://github.com/huggingface/datatrove). Where this differs:

- Words are cut at white space. datatrove uses spaCy, which makes every punctuation mark a word of
  its own: they lower the share of words with a letter, and so its Gopher rules drop more.
- Gopher's stop words count in any case, since a heading in capitals is English too. A bullet may
  be any of seven, not only `•` and `-`.
- Lines are those that are not blank, without white space around them. Blank lines would dilute
  the shares of bullets and ellipses.
- An n-gram that occurs once is no repetition; in a text of few words datatrove calls it one.
- Repetition rules run in the order of Gopher's table A1, lines before paragraphs.
- C4's bounds are those of the code that made C4, 5 words a line and 3 sentences; datatrove has 3
  and 5. Curly closing quotation marks end a line as well. Blank lines between kept paragraphs
  stay, and a page that loses nothing stays as it is. Sentences are counted by a simple pattern in
  place of a trained or rule-based splitter.
- FineWeb's bound on duplicated characters is 0.1 as in the paper's section 3.6; datatrove's
  default is 0.01. A document on a bound goes, and a line of 30 characters is not short; in
  datatrove it is the other way. Closing quotation marks count as end punctuation. datatrove's
  fourth rule (new lines per word) is not in that section and left out. After C4 every line ends
  with punctuation, so FineWeb's rule on that matters where `c4` is off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from posttrain.data.batch import RowBatch
from posttrain.data.operations.base import Decisions, Drop, Edit
from posttrain.data.operations.quality_c4 import Cleaned, c4
from posttrain.data.operations.quality_fineweb import fineweb
from posttrain.data.operations.quality_gopher import gopher_quality
from posttrain.data.operations.quality_repetition import repeated_lines, repeated_ngrams
from posttrain.data.operations.quality_text import Page, Utf8Texts
from posttrain.data.rows import from_record
from posttrain.errors import DataError
from posttrain.recipe.prepare import DocumentQuality


@dataclass(frozen=True)
class DocumentQualityFilter:
    """Drops and edits documents by the groups of rules that the settings switch on."""

    settings: DocumentQuality

    @property
    def name(self) -> str:
        """Key in the recipe."""
        return "document_quality"

    def apply(self, batch: RowBatch) -> Decisions:
        """Decide on the documents of a batch.

        Raises:
            DataError: The rows are no documents.
        """
        if batch.family != "documents":
            raise DataError(
                f"document_quality: its rules are for documents, and these rows are "
                f"{batch.family}; write `answer_quality` instead"
            )
        utf8 = Utf8Texts(batch.texts)
        pages = dict(enumerate(map(Page, utf8.texts)))
        drops: dict[int, Drop] = {}
        cleaned: dict[int, Cleaned] = {}
        if self.settings.gopher:
            counts = utf8.counts
            _drop(drops, pages, {i: gopher_quality(page, counts[i]) for i, page in pages.items()})
        if self.settings.gopher_repetition:
            _drop(drops, pages, {i: repeated_lines(page) for i, page in pages.items()})
            _drop(drops, pages, repeated_ngrams(utf8, list(pages)))
        if self.settings.c4:
            results = {i: c4(page) for i, page in pages.items()}
            cleaned = {i: each for i, each in results.items() if isinstance(each, Cleaned)}
            _drop(drops, pages, {i: each for i, each in results.items() if isinstance(each, Drop)})
            pages.update((i, each.page) for i, each in cleaned.items())
        if self.settings.fineweb:
            _drop(drops, pages, {i: fineweb(page) for i, page in pages.items()})
        edited = {i: cleaned[i] for i in pages if i in cleaned and cleaned[i].changed}
        found = sum((each.removed for each in edited.values()), Counter[str]())
        return Decisions(drops=drops, edits=_edits(batch, edited), found=found)


def _drop(
    drops: dict[int, Drop], pages: dict[int, Page], broken: Mapping[int, Drop | None]
) -> None:
    """Note the drops, and take their pages out of what the next rules see."""
    for position, drop in broken.items():
        if drop is not None:
            drops[position] = drop
            del pages[position]


def _edits(batch: RowBatch, edited: Mapping[int, Cleaned]) -> dict[int, Edit]:
    if not edited:
        return {}
    edits: dict[int, Edit] = {}
    records = batch.table.take(list(edited)).to_pylist()
    for (position, each), record in zip(edited.items(), records, strict=True):
        row = from_record(batch.family, {**record, "text": each.page.text})
        edits[position] = Edit(row, each.detail)
    return edits
