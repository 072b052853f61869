"""What can be measured of answers without knowing what a good one is.

None of these is a judgement: a summary repeats itself more than a poem, and a refusal may be right.
They are read as differences between two moments of one training run, on the same prompts. Words
are those of `posttrain.data.words`: lower case, and single characters in scripts that put no spaces
between words. A punctuation mark or other symbol counts as a word of its own: a model that is
rewarded for commas ends by writing little else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.data.words import Words, hash_words, ngram_hashes

_REPEATED = 3
"""Words of the n-grams whose repetition counts."""

REFUSALS = (
    r"i(?:'m| am) sorry,? (?:but|i)\b",
    r"i apologi[sz]e,? but\b",
    r"i (?:can(?:no|')t|can not|won't|will not) "
    r"(?:help(?! but)|assist|answer|provide|do that|comply|fulfil)",
    r"i(?:'m| am) (?:unable|not able) to\b",
    r"i(?:'m| am) not (?:comfortable|allowed|permitted)\b",
    r"i must (?:decline|refuse)\b",
    r"as an ai\b",
)
"""Ways to begin a refusal, in English: after the list of refusals in the evaluation of Zou et al.
(2023, arXiv:2307.15043), shortened to what seldom begins another answer."""

HEDGES = (
    r"i(?:'m| am) not (?:entirely |completely )?(?:sure|certain)\b",
    r"i (?:think|believe|guess|suppose)\b",
    r"it(?:'s| is) (?:possible|likely|hard to say|difficult to say)\b",
    r"it (?:depends|may|might|could) ",
    r"(?:may|might|could) (?:be|have)\b",
    r"(?:perhaps|maybe|possibly|presumably|arguably)\b",
    r"generally speaking\b",
    r"it(?:'s| is) (?:important|worth) (?:to note|noting)\b",
)
"""Ways to hedge, in English: a few of the commonest in Hyland's list (Metadiscourse, 2005), and
what chat models put in their place."""

_OPENING = 200
"""Characters from the beginning in which an answer has refused, if it refuses."""

_MARK = re.compile(r"[^\w\s]")
_REFUSES = re.compile(r"\b(?:" + "|".join(REFUSALS) + ")")
_HEDGES = re.compile(r"\b(?:" + "|".join(HEDGES) + ")")


@dataclass(frozen=True)
class Measures:
    """Of each answer; all arrays are of shape (answers,)."""

    repetition: np.ndarray
    """Share of its word 3-grams that stood in it before: 1 - unique / all, as seq-rep-n of
    Welleck et al. (2020, arXiv:1908.04319). 0 below three words."""
    longest_run: np.ndarray
    """Most times one word stands in a row, int64."""
    refusals: np.ndarray
    """Whether it begins like a refusal: see `REFUSALS`. English only, and a polite refusal in
    other words is missed."""
    hedges: np.ndarray
    """Whether it hedges anywhere: see `HEDGES`. English only; a long answer has more room to."""


def measure(answers: Sequence[str]) -> Measures:
    """Measure each answer."""
    words = _words(answers)
    plain = [answer.lower().replace("\u2019", "'") for answer in answers]
    return Measures(
        repetition=_repetition(words),
        longest_run=np.array([_longest_run(own) for own in _split(words)], np.int64),
        refusals=np.array([bool(_REFUSES.search(text[:_OPENING])) for text in plain]),
        hedges=np.array([bool(_HEDGES.search(text)) for text in plain]),
    )


def distinct(answers: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams of all answers together; 0 without any.

    Distinct-n of Li et al. (2016, arXiv:1510.03055), who divide by the words instead. It falls when
    answers become alike, and also when they merely become longer: compare it at equal lengths.
    """
    grams = ngram_hashes(_words(answers), n).hashes
    return len(np.unique(grams)) / len(grams) if len(grams) else 0.0


def describe(answers: Sequence[str]) -> dict[str, float]:
    """Means over the answers, and distinct-n over all of them: what is plotted."""
    measures = measure(answers)
    return {
        "repetition": float(measures.repetition.mean()),
        "distinct_1": distinct(answers, 1),
        "distinct_2": distinct(answers, 2),
        "refusals": float(measures.refusals.mean()),
        "hedges": float(measures.hedges.mean()),
    }


def distinct_fall_p(
    before: Sequence[str], after: Sequence[str], n: int, samples: int, seed: int
) -> float:
    """One-sided p-value against "distinct-n has not fallen", paired by prompt.

    A permutation test: were the two answers to each prompt alike in kind, exchanging them at random
    would change the difference of the two distinct-n no more often than by chance (Good,
    Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005). Exchanged are whole answers,
    so that a difference in length is tested along with the words.
    """
    grams = ngram_hashes(_words([*before, *after]), n)
    names, number = np.unique(grams.hashes, return_inverse=True)
    if not len(names):
        return 1.0
    pairs, side = _pair_and_side(grams, len(before))
    seen = _difference(number, side, len(names))
    rng = np.random.default_rng(seed)
    as_low = 0
    for _ in range(samples):
        exchanged = rng.random(len(before)) < 0.5
        as_low += _difference(number, side ^ exchanged[pairs], len(names)) <= seen + 1e-12
    return (1 + as_low) / (1 + samples)


def _words(answers: Sequence[str]) -> Words:
    """Words and marks; a mark is spelled out, since only letters make words there."""
    return hash_words(
        [_MARK.sub(lambda mark: f" _{ord(mark[0]):x}_ ", answer) for answer in answers]
    )


def _repetition(words: Words) -> np.ndarray:
    grams = _split(ngram_hashes(words, _REPEATED))
    return np.array([1 - len(np.unique(own)) / len(own) if len(own) else 0.0 for own in grams])


def _split(words: Words) -> list[np.ndarray]:
    return np.split(words.hashes, words.offsets[1:-1]) if len(words.counts) else []


def _longest_run(hashes: np.ndarray) -> int:
    if not len(hashes):
        return 0
    changes = np.flatnonzero(hashes[1:] != hashes[:-1])
    return int(np.diff(np.concatenate([[-1], changes, [len(hashes) - 1]])).max())


def _pair_and_side(grams: Words, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each n-gram: the prompt it answers, and whether it is from the answers after."""
    answer = np.repeat(np.arange(2 * pairs), grams.counts)
    return answer % pairs, answer >= pairs


def _difference(number: np.ndarray, after: np.ndarray, names: int) -> float:
    """Distinct-n of the n-grams after, less that of those before."""
    counts = np.bincount(number + names * after, minlength=2 * names).reshape(2, names)
    shares = (counts > 0).sum(1) / np.maximum(counts.sum(1), 1)
    return float(shares[1] - shares[0])
