"""Overlap of words or characters with the reference: ROUGE, BLEU, chrF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import regex  # type: ignore[import-untyped]

from posttrain.evaluate.metrics.base import Case, Metric, Scores, Tell
from posttrain.recipe.test_sets import Bleu, Chrf, Rouge

_WORDS = regex.compile(
    # A character is a word in scripts that put no spaces between words.
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
    r"|[\p{L}\p{N}\p{M}--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]+",
    regex.VERSION1,
)


def make(config: Rouge | Bleu | Chrf) -> Metric:
    """The metric of a recipe."""
    return RougeMetric(config) if isinstance(config, Rouge) else SacreMetric(config)


class RougeMetric:
    """ROUGE by rouge-score, with words that other scripts than Latin have as well.

    The library's own tokenizer knows a-z and 0-9 alone: of Russian or Chinese nothing would be
    left. On ASCII text the words, and so the scores, are the library's.
    """

    packages: tuple[str, ...] = ("rouge-score", "regex")

    def __init__(self, config: Rouge) -> None:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

        self._type = config.type
        self._title = config.title
        self._scorer = RougeScorer([config.type], tokenizer=_Words(config.stemmer))
        if config.stemmer:
            self.packages = (*self.packages, "nltk")

    def refuse(self, reference: str) -> str | None:
        """It has to have text."""
        return _refuse_blank(reference)

    def score(self, cases: Sequence[Case], tell: Tell) -> Scores:
        """F1 each; precision and recall beside it."""
        found = []
        for number, case in enumerate(cases, start=1):
            found.append(self._score(case.answers[0], case.reference))
            tell(number, len(cases))
        precision, recall, f1 = zip(*found, strict=True)
        also = {f"{self._title}_precision": precision, f"{self._title}_recall": recall}
        return Scores(f1, also=also)

    def _score(self, answer: str, reference: str) -> tuple[float, float, float]:
        if answer.strip() == reference.strip():  # which may have no word, or no pair of words
            return 1.0, 1.0, 1.0
        score = self._scorer.score(reference, answer)[self._type]
        return float(score.precision), float(score.recall), float(score.fmeasure)


class _Words:
    """rouge-score's tokenizer for any script."""

    def __init__(self, stemmer: bool) -> None:
        from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]

        self._stemmer = PorterStemmer() if stemmer else None

    def tokenize(self, text: str) -> list[str]:
        """Runs of letters and digits in lower case; stems of those longer than three."""
        words: list[str] = _WORDS.findall(text.lower())
        if self._stemmer is None:
            return words
        return [self._stemmer.stem(word) if len(word) > 3 else word for word in words]


class SacreMetric:
    """BLEU or chrF by sacreBLEU, over 100; of an item and of all items together.

    BLEU of all items is not the mean of theirs: it counts all runs of words in one sum. That of an
    item leaves out runs that are longer than it, and smooths (`effective_order`, `exp`).
    """

    packages: tuple[str, ...] = ("sacrebleu",)

    def __init__(self, config: Bleu | Chrf) -> None:
        self._title = config.title
        self._single, self._all = _scorers(config)

    def refuse(self, reference: str) -> str | None:
        """It has to have text."""
        return _refuse_blank(reference)

    def score(self, cases: Sequence[Case], tell: Tell) -> Scores:
        """That of each, and `corpus_...` of all."""
        answers = [case.answers[0].strip() for case in cases]
        references = [case.reference.strip() for case in cases]
        values = []
        for answer, reference in zip(answers, references, strict=True):
            values.append(self._score(answer, reference))
            tell(len(values), len(cases))
        together = _share(self._all.corpus_score(answers, [references]).score)
        return Scores(tuple(values), corpus={f"corpus_{self._title}": together})

    def _score(self, answer: str, reference: str) -> float:
        if answer == reference:
            return 1.0
        return _share(self._single.sentence_score(answer, [reference]).score)


def _scorers(config: Bleu | Chrf) -> tuple[Any, Any]:
    """For single items, and for all of them."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if isinstance(config, Chrf):
        chrf = CHRF(word_order=config.word_order, lowercase=config.ignore_case)
        return chrf, chrf

    def bleu(effective_order: bool) -> BLEU:
        # `force`: text that looks tokenized is the model's business, not a mistake of the caller's.
        return BLEU(
            lowercase=config.ignore_case,
            force=True,
            tokenize=config.tokenize,
            effective_order=effective_order,
        )

    return bleu(effective_order=True), bleu(effective_order=False)


def _share(percent: float) -> float:
    return min(1.0, max(0.0, percent / 100))


def _refuse_blank(reference: str) -> str | None:
    return None if reference.strip() else "has no text"
