r"""Who was right: similarities counted from the texts, not sketched.

A contestant kept some documents of a corpus. Two questions are asked of what it removed:

recall        Of the planted pairs whose texts have a Jaccard similarity of at least 0.8, the share
              of which a member was removed. Every copy has a source of its own, so no pair can be
              found by way of another.
false drops   Removed documents for which no document of the whole corpus has a similarity of at
              least 0.8. The planted partner is tried first; for the others every document that
              shares an n-gram is counted out.

Similarity is the Jaccard index of the sets of word 5-grams, in lower case, of `\w+`.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from corpus import jaccard, word_ngrams

THRESHOLD = 0.8
RANGES = ((0.8, 0.85), (0.85, 0.9), (0.9, 1.0))
"""Recall is given for each: from the first, below the second. Pairs of 1.0 come on top."""


@dataclass(frozen=True)
class Pair:
    """A copy, its source, and how similar their texts are."""

    copy: int
    source: int
    similarity: float


class Judge:
    """Knows a corpus: its texts and its planted pairs."""

    def __init__(self, corpus: Path) -> None:
        self._texts = {
            record["id"]: record["text"]
            for part in sorted(corpus.glob("part-*.jsonl"))
            for record in map(json.loads, part.open(encoding="utf-8"))
        }
        planted = map(json.loads, (corpus / "truth.jsonl").open())
        self._pairs = [self._pair(line["id"], line["src"]) for line in planted]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._texts)

    def verdict(self, kept: Path) -> dict[str, object]:
        """Recall, false drops and emptied clusters of what a contestant kept in a folder."""
        removed = self._texts.keys() - kept_ids(kept)
        wanted = [pair for pair in self._pairs if pair.similarity >= THRESHOLD]
        return {
            "removed": len(removed),
            "recall": share_found(wanted, removed),
            "recall_by_similarity": {
                f"{low}-{high}": share_found(
                    [pair for pair in wanted if low <= pair.similarity < high], removed
                )
                for low, high in RANGES
            },
            "recall_exact": share_found([p for p in wanted if p.similarity == 1], removed),
            "false_drops": len(self._without_partner(removed)),
            "both_removed": sum({p.copy, p.source} <= removed for p in self._pairs),
        }

    def _pair(self, copy: int, source: int) -> Pair:
        one, other = self._texts[copy], self._texts[source]
        return Pair(
            copy, source, 1.0 if one == other else jaccard(word_ngrams(one), word_ngrams(other))
        )

    def _without_partner(self, removed: Collection[int]) -> set[int]:
        """Removed documents that no document of the corpus is similar to."""
        excused = {
            member
            for pair in self._pairs
            if pair.similarity >= THRESHOLD
            for member in (pair.copy, pair.source)
        }
        suspects = set(removed) - excused
        grams = {suspect: word_ngrams(self._texts[suspect]) for suspect in suspects}
        suspects_with = defaultdict(list)
        for suspect, its_grams in grams.items():
            for gram in its_grams:
                suspects_with[gram].append(suspect)
        for number, text in self._texts.items() if suspects else ():
            its_grams = word_ngrams(text)
            shared = Counter(
                suspect
                for gram in its_grams & suspects_with.keys()
                for suspect in suspects_with[gram]
            )
            for suspect, count in shared.items():
                union = len(its_grams) + len(grams[suspect]) - count
                if suspect != number and count / union >= THRESHOLD:
                    suspects.discard(suspect)
        return suspects


def share_found(pairs: list[Pair], removed: Collection[int]) -> float | None:
    """Share of pairs that lost a member; nothing where there are no pairs."""
    found = sum(pair.copy in removed or pair.source in removed for pair in pairs)
    return round(found / len(pairs), 5) if pairs else None


def kept_ids(folder: Path) -> set[int]:
    """Ids of all documents in a folder's JSONL files. datatrove leaves out an id of 0."""
    return {
        int(json.loads(line).get("id", 0))
        for file in folder.glob("*.jsonl")
        for line in file.open(encoding="utf-8")
    }
