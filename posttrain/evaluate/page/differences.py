"""One evaluation against another: as a gate's verdict says it, or computed where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from posttrain.errors import DataError
from posttrain.evaluate import statistics
from posttrain.evaluate.page.measured import Measured, is_binary
from posttrain.evaluate.pairing import Pair, check_comparable, paired_items
from posttrain.evaluate.perplexity_check import MIN_PERPLEXITY_ROWS, paired_rows
from posttrain.evaluate.results import Check, Outcome, PerplexityCheck, Verdict, Versus
from posttrain.evaluate.task_check import check_task
from posttrain.recipe.gate import GateConfig

BOTH_SIDES = 0.975
"""Confidence of each bound of a 95% interval: nobody said beforehand which of two models should be
the better one."""


@dataclass(frozen=True)
class Difference:
    """A task's paired difference; positive is better."""

    task: str
    metric: str
    n: int
    mean: float
    low: float
    """One-sided lower bound."""
    high: float
    mcnemar_p: float | None
    detectable: float
    items_needed: int | None
    max_drop: float
    outcome: Outcome | None
    """What a gate says of it; None without one."""

    @property
    def event(self) -> Literal["higher", "lower", "not told apart"]:
        """What is shown of it at the bounds' confidence, whatever drop is accepted."""
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "not told apart"


@dataclass(frozen=True)
class PerplexityDifference:
    """Held-out rows of a dataset or of one of its groups; positive is better."""

    dataset: str
    group: str
    rows: int
    mean: float
    """Nats a token by which the later is better; where the tokenizers differ, bits a byte."""
    low: float | None
    high: float | None
    unit: Literal["token", "byte"]
    outcome: Outcome | None


@dataclass(frozen=True)
class Against:
    """All differences of one model to another."""

    before: str
    """Label of the evaluation that is compared with."""
    after: str
    differences: tuple[Difference, ...]
    perplexities: tuple[PerplexityDifference, ...]
    confidence: float
    """Of each bound."""
    outcome: Outcome | None = None
    reasons: tuple[str, ...] = ()


def from_verdict(before: Measured, after: Measured, verdict: Verdict) -> Against:
    """What a gate says of a candidate against the base."""
    checks = [verdict.perplexity, *verdict.other_perplexities]
    return Against(
        before=before.label,
        after=after.label,
        differences=tuple(map(_of_check, verdict.checks)),
        perplexities=_perplexities(before, after, [c for c in checks if c], verdict.confidence),
        confidence=verdict.confidence,
        outcome=verdict.verdict,
        reasons=verdict.reasons,
    )


def from_versus(
    before: Measured | None, after: Measured, versus: Versus, confidence: float
) -> Against:
    """What a gate says of a candidate against the champion; groups need its evaluation."""
    improvement = (versus.improvement,) if versus.improvement else ()
    said = tuple(map(_of_perplexity_check, versus.perplexities))
    return Against(
        before=before.label if before else versus.opponent,
        after=after.label,
        differences=tuple(map(_of_check, versus.checks)),
        perplexities=_perplexities(before, after, versus.perplexities, confidence)
        if before
        else said,
        confidence=confidence,
        outcome=versus.verdict,
        reasons=tuple(dict.fromkeys([*versus.reasons, *improvement])),
    )


def compute(
    before: Measured, after: Measured, *, max_drop: float, confidence: float = BOTH_SIDES
) -> Against:
    """Paired differences of any two evaluations made with the same settings.

    Args:
        before: What is compared with.
        after: What is compared.
        max_drop: The drop that `items_needed` is about.
        confidence: Of each bound.

    Raises:
        DataError: the two were made with different settings or on different items.
    """
    config = GateConfig(max_drop=max_drop, confidence=confidence)
    first, second = before.evaluation, after.evaluation
    check_comparable(first, second)
    pairs = paired_items(first.items, second.items, (before.label, after.label))
    checks = [
        check_task(task, pairs[name], "must_not_drop", max_drop, config)
        for name, task in before.tasks.items()
        if pairs.get(name)
    ]
    return Against(
        before=before.label,
        after=after.label,
        # No gate asked, so none answers.
        differences=tuple(replace(_of_check(one), outcome=None) for one in checks),
        perplexities=_perplexities(before, after, (), confidence),
        confidence=confidence,
    )


def mcnemar(pairs: Sequence[Pair]) -> float | None:
    """Exact p-value of "equally often right"; None where scores are not right or wrong."""
    if not is_binary([item.value for pair in pairs for item in pair]):
        return None
    return statistics.mcnemar_exact(
        [first.value for first, _ in pairs], [second.value for _, second in pairs]
    )


def _of_check(check: Check) -> Difference:
    return Difference(
        task=check.task,
        metric=check.metric,
        n=check.n,
        mean=check.difference,
        low=check.low,
        high=check.high,
        mcnemar_p=check.mcnemar_p,
        detectable=check.smallest_detectable_drop,
        items_needed=check.items_needed,
        max_drop=check.max_drop,
        outcome=check.verdict,
    )


def _perplexities(
    before: Measured,
    after: Measured,
    checks: Sequence[PerplexityCheck],
    confidence: float,
) -> tuple[PerplexityDifference, ...]:
    """Whole datasets as the gate says, all else from the rows."""
    said = {check.dataset: check for check in checks}
    theirs, found = after.perplexities, []
    for dataset, group in before.perplexities:
        check = said.get(dataset)
        if (dataset, group) not in theirs:
            continue
        if check is not None and not group:
            found.append(_of_perplexity_check(check))
            continue
        one = _of_rows(dataset, group, before, after, confidence)
        if one is not None:
            found.append(one)
    return tuple(found)


def _of_perplexity_check(check: PerplexityCheck) -> PerplexityDifference:
    return PerplexityDifference(
        dataset=check.dataset,
        group="",
        rows=check.rows,
        mean=check.difference,
        low=check.low,
        high=check.high,
        unit=check.unit,
        outcome=check.verdict,
    )


def _of_rows(
    dataset: str, group: str, before: Measured, after: Measured, confidence: float
) -> PerplexityDifference | None:
    """From the rows themselves; None where the two did not score the same text."""
    try:
        rows = paired_rows(before.of_group(dataset, group), after.of_group(dataset, group), dataset)
    except DataError:
        return None
    if not rows.before:
        return None
    config = GateConfig(confidence=confidence)
    enough = len(rows.before) >= MIN_PERPLEXITY_ROWS
    bounds = rows.difference(config) if enough else None
    first, second = before.perplexities[dataset, group], after.perplexities[dataset, group]
    mean = first.nats_per_token - second.nats_per_token
    if rows.unit == "byte":
        mean = first.bits_per_byte - second.bits_per_byte
    return PerplexityDifference(
        dataset=dataset,
        group=group,
        rows=len(rows.before),
        mean=mean,
        low=bounds.low if bounds else None,
        high=bounds.high if bounds else None,
        unit=rows.unit,
        outcome=None,
    )
