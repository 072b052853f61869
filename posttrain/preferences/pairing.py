"""Pairs of better and worse answers, from scores; what makes no pair is counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from posttrain.preferences.agreement import Share, share
from posttrain.preferences.answers import AnswerSet, SampledAnswer

Choose = Literal["best-worst", "all", "adjacent"]
"""Of one prompt's answers: the best and the worst, every two, or every two that are next to each
other in rank."""

_SURE = 0.75
"""Share of the longer answers among the chosen that counts as `nearly always`, if the whole
interval lies above it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first better by the reward."""

    answers: AnswerSet
    chosen: SampledAnswer
    rejected: SampledAnswer
    scores: tuple[float, float]
    """Of chosen and rejected."""
    ranks: tuple[int, int]
    """Among the prompt's distinct answers; 1 is the best, equal scores share a rank."""

    @property
    def margin(self) -> float:
        """By how much the chosen one scores higher; above 0."""
        return self.scores[0] - self.scores[1]


class PairCounts(_Frozen):
    """What was sampled and what came of it."""

    prompts: int
    prompts_too_long: int
    """Left out, with those of rows that have none."""
    answers: int
    answers_blank: int
    """Left out."""
    answers_repeated: int
    """Equal to an earlier answer to the same prompt; left out."""
    answers_cut: int
    """Ended by the longest length, and not by the model."""
    prompts_one_answer: int
    """Prompts without a pair for want of two distinct answers."""
    pairs_tied: int
    """Left out: both answers have the same score."""
    pairs_close: int
    """Left out: the margin is below the least."""
    pairs: int


class Lengths(_Frozen):
    """Tokens of the answers, averaged over pairs."""

    chosen: float
    rejected: float
    longer_chosen: Share | None
    """Of the pairs whose answers differ in length; None if none do."""


class PairReport(_Frozen):
    """Everything that is said about a set of pairs."""

    counts: PairCounts
    margins: dict[str, float]
    """Smallest, quartiles and largest, by name; empty without pairs."""
    mean_chosen: float | None
    """Score."""
    mean_rejected: float | None
    lengths: Lengths | None


class PairSettings(_Frozen):
    """Which pairs are made."""

    choose: Choose = "best-worst"
    min_margin: Annotated[float, Field(ge=0)] = 0.0


def make_pairs(
    sets: Sequence[AnswerSet],
    scores: Sequence[Mapping[str, float]],
    settings: PairSettings,
    too_long: int = 0,
) -> tuple[list[Pair], PairReport]:
    """Pair the answers to each prompt.

    Args:
        sets: The answers to each prompt.
        scores: For each prompt, the score of each answer's text; blank answers have none.
        settings: Which pairs.
        too_long: Prompts that were not asked, for the counts.

    Returns:
        The pairs in the order of the prompts, and what is said about them.
    """
    pairs: list[Pair] = []
    tied = close = 0
    for one, scored in zip(sets, scores, strict=True):
        for pair in _candidates(one, scored, settings.choose):
            if pair.margin == 0:
                tied += 1
            elif pair.margin < settings.min_margin:
                close += 1
            else:
                pairs.append(pair)
    answers = [answer for one in sets for answer in one.answers]
    blank = sum(not answer.text for answer in answers)
    counts = PairCounts(
        prompts=len(sets),
        prompts_too_long=too_long,
        answers=len(answers),
        answers_blank=blank,
        answers_repeated=len(answers) - blank - sum(map(len, scores)),
        answers_cut=sum(not answer.ended for answer in answers),
        prompts_one_answer=sum(len(scored) < 2 for scored in scores),
        pairs_tied=tied,
        pairs_close=close,
        pairs=len(pairs),
    )
    return pairs, _report(counts, pairs)


def remarks(report: PairReport) -> list[str]:
    """What a person should know before training on the pairs."""
    said = []
    longer = report.lengths.longer_chosen if report.lengths else None
    if longer is not None and longer.low > _SURE:
        said.append(_about_length("longer", longer.count, longer.of))
    elif longer is not None and longer.high < 1 - _SURE:
        said.append(_about_length("shorter", longer.of - longer.count, longer.of))
    counts = report.counts
    if 2 * counts.answers_cut > counts.answers:
        share_cut = counts.answers_cut / counts.answers
        said.append(
            f"{share_cut:.0%} of the answers were cut off at --max-new-tokens; the pairs compare "
            "beginnings of answers, and none that is cut shows how an answer ends"
        )
    if counts.pairs == 0:
        said.append("there is no pair; look at the counts above for why")
    return said


def _about_length(which: str, count: int, of: int) -> str:
    return (
        f"the {which} answer wins in {count} of {of} pairs: a model trained on them learns length "
        "first; look at the reward, or score answers of like length"
    )


def _candidates(one: AnswerSet, scored: Mapping[str, float], choose: Choose) -> Iterator[Pair]:
    distinct: dict[str, SampledAnswer] = {}
    for answer in one.answers:
        if answer.text:
            distinct.setdefault(answer.text, answer)
    # Stable: of equal scores the one that was sampled first stands first.
    ranked = sorted(distinct.values(), key=lambda answer: -scored[answer.text])
    values = [scored[answer.text] for answer in ranked]
    for better, worse in _positions(len(ranked), choose):
        yield Pair(
            answers=one,
            chosen=ranked[better],
            rejected=ranked[worse],
            scores=(values[better], values[worse]),
            ranks=(values.index(values[better]) + 1, values.index(values[worse]) + 1),
        )


def _positions(count: int, choose: Choose) -> Iterator[tuple[int, int]]:
    """Places in the ranking, the better one first."""
    if count < 2:
        return
    if choose == "best-worst":
        yield 0, count - 1
    elif choose == "adjacent":
        yield from itertools.pairwise(range(count))
    else:
        yield from itertools.combinations(range(count), 2)


def _report(counts: PairCounts, pairs: Sequence[Pair]) -> PairReport:
    if not pairs:
        return PairReport(
            counts=counts, margins={}, mean_chosen=None, mean_rejected=None, lengths=None
        )
    import numpy as np

    names = ("min", "25%", "50%", "75%", "max")
    quantiles = np.quantile([pair.margin for pair in pairs], (0, 0.25, 0.5, 0.75, 1))
    unlike = [pair for pair in pairs if pair.chosen.tokens != pair.rejected.tokens]
    longer = sum(pair.chosen.tokens > pair.rejected.tokens for pair in unlike)
    return PairReport(
        counts=counts,
        margins=dict(zip(names, quantiles.tolist(), strict=True)),
        mean_chosen=float(np.mean([pair.scores[0] for pair in pairs])),
        mean_rejected=float(np.mean([pair.scores[1] for pair in pairs])),
        lengths=Lengths(
            chosen=float(np.mean([pair.chosen.tokens for pair in pairs])),
            rejected=float(np.mean([pair.rejected.tokens for pair in pairs])),
            longer_chosen=share(longer, len(unlike)),
        ),
    )
