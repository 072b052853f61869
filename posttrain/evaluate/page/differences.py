"""One evaluation against another: as a gate's verdict says it, or computed where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.errors import DataError
from posttrain.evaluate import statistics
from posttrain.evaluate.items import PerplexityRow
from posttrain.evaluate.page.measured import Measured, is_binary
from posttrain.evaluate.pairing import Pair, paired_items
from posttrain.evaluate.results import Check, Outcome, PerplexityCheck, TaskResult, Verdict, Versus

SEED = 0
"""Of the bootstrap where no gate says another."""
MIN_ROWS = 10
"""Held-out rows below which no interval of perplexity is believed."""


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
    sentence: str

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
    """Nats a token, or a byte where the tokenizers differ, by which the later is better."""
    low: float | None
    high: float | None
    unit: Literal["token", "byte"]
    outcome: Outcome | None
    sentence: str


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
    before: Measured, after: Measured, *, max_drop: float, confidence: float = 0.95
) -> Against:
    """Paired differences of any two evaluations made with the same settings.

    Args:
        before: What is compared with.
        after: What is compared.
        max_drop: The drop that `items_needed` is about.
        confidence: Of each one-sided bound.

    Raises:
        DataError: the two were made with different settings or on different items.
    """
    check_comparable(before, after)
    pairs = paired_items(
        [item for items in before.items.values() for item in items],
        [item for items in after.items.values() for item in items],
    )
    return Against(
        before=before.label,
        after=after.label,
        differences=tuple(
            _difference(task, pairs[name], max_drop, confidence)
            for name, task in before.tasks.items()
            if pairs.get(name)
        ),
        perplexities=_perplexities(before, after, (), confidence),
        confidence=confidence,
    )


def check_comparable(before: Measured, after: Measured) -> None:
    """Raises: DataError: the two were made with different settings."""
    if before.results.settings_digest == after.results.settings_digest:
        return
    differing = before.results.settings.differences(after.results.settings)
    lines = "".join(f"\n  {line}" for line in differing)
    raise DataError(
        f"{before.label} and {after.label} were evaluated with different settings, so their "
        f"difference would mean nothing; evaluate both alike ({before.label} first below):{lines}"
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
        sentence=check.sentence,
    )


def _difference(
    task: TaskResult, pairs: Sequence[Pair], max_drop: float, confidence: float
) -> Difference:
    sign = 1.0 if task.higher_is_better else -1.0
    found = statistics.paired_difference(
        [sign * first.value for first, _ in pairs],
        [sign * second.value for _, second in pairs],
        groups=[first.group for first, _ in pairs],
        max_drop=max_drop,
        confidence=confidence,
        seed=SEED,
    )
    settled = statistics.non_inferiority(found, max_drop) != "not enough evidence"
    return Difference(
        task=task.task,
        metric=task.metric,
        n=found.n,
        mean=found.mean,
        low=found.low,
        high=found.high,
        mcnemar_p=mcnemar(pairs),
        detectable=statistics.smallest_detectable_drop(found.standard_error, confidence),
        items_needed=None if settled else statistics.items_needed(found, max_drop, confidence),
        max_drop=max_drop,
        outcome=None,
        sentence="",
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
        one = _of_rows(
            dataset,
            group,
            before.rows_of(dataset, group),
            after.rows_of(dataset, group),
            confidence,
        )
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
        sentence=check.sentence,
    )


def _of_rows(
    dataset: str,
    group: str,
    before: Sequence[PerplexityRow],
    after: Sequence[PerplexityRow],
    confidence: float,
) -> PerplexityDifference | None:
    """By token, or by byte where the tokens are others; None where the rows are."""
    if not before or [(row.id, row.bytes) for row in before] != [
        (row.id, row.bytes) for row in after
    ]:
        return None
    same = [row.tokens for row in before] == [row.tokens for row in after]
    sizes = [row.tokens if same else row.bytes for row in before]
    if not all(sizes):
        return None
    saved = sum(row.nats for row in before) - sum(row.nats for row in after)
    bounds = None
    if len(before) >= MIN_ROWS:
        bounds = statistics.paired_nats(
            [row.nats for row in before],
            [row.nats for row in after],
            sizes,
            confidence=confidence,
            seed=SEED,
        )
    return PerplexityDifference(
        dataset=dataset,
        group=group,
        rows=len(before),
        mean=saved / sum(sizes),
        low=bounds.low if bounds else None,
        high=bounds.high if bounds else None,
        unit="token" if same else "byte",
        outcome=None,
        sentence="",
    )
