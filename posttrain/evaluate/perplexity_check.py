"""What held-out rows say: whether the candidate predicts them as well as another model does.

Where both models cut a row into the same tokens, nats are compared by token. Where they do not, but
the same text is scored, they are compared by byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.errors import DataError
from posttrain.evaluate import statistics
from posttrain.evaluate.items import PerplexityRow
from posttrain.evaluate.pairing import Evaluation
from posttrain.evaluate.results import Outcome, PerplexityCheck, PerplexityResult, three_digits
from posttrain.evaluate.statistics import PairedDifference
from posttrain.recipe.gate import GateConfig

PERPLEXITY_TOLERANCE = 0.01
"""Nats a token by which perplexity may rise under `must_not_rise`: one percent. With no tolerance
at all a model could never be shown not to have risen."""

MIN_PERPLEXITY_ROWS = 10
"""Held-out rows below which no interval of perplexity is believed."""

Rule = Literal["must_improve", "must_not_rise"]


@dataclass(frozen=True)
class PairedRows:
    """The held-out rows of one dataset under two models."""

    before: Sequence[PerplexityRow]
    after: Sequence[PerplexityRow]
    unit: Literal["token", "byte"]

    @property
    def unit_nats(self) -> float:
        """What one nat a token, by the tokens of the first model, is in the unit."""
        if self.unit == "token":
            return 1.0
        tokens = sum(row.tokens for row in self.before)
        return tokens / sum(row.bytes for row in self.before) / math.log(2)

    def difference(self, config: GateConfig, tolerance: float = 0.0) -> PairedDifference:
        """Nats a token, or bits a byte, by which the second model is better.

        Args:
            config: Confidence and bootstrap.
            tolerance: The rise that the p-value is against, in nats a token of the first model.
        """
        rows = [
            (first, second)
            for first, second in zip(self.before, self.after, strict=True)
            if self.unit == "token" or first.bytes
        ]
        scale = 1.0 if self.unit == "token" else 1 / math.log(2)
        return statistics.paired_nats(
            [first.nats * scale for first, _ in rows],
            [second.nats * scale for _, second in rows],
            [first.tokens if self.unit == "token" else first.bytes for first, _ in rows],
            max_rise=tolerance * self.unit_nats,
            confidence=config.confidence,
            bootstrap_samples=config.bootstrap_samples,
            seed=config.seed,
        )


def paired_rows(first: Evaluation, second: Evaluation, dataset: str = "") -> PairedRows:
    """The rows of one dataset, in the order in which they were scored.

    Args:
        first: The base, or another model that is compared with.
        second: The candidate.
        dataset: One of the other datasets; empty for the one that the evaluation is about.

    Raises:
        DataError: they are not the same rows, or one model was shown more of a row.
    """
    before, after = _of_dataset(first, dataset), _of_dataset(second, dataset)
    which = f" of `{dataset}`" if dataset else ""
    if [row.id for row in before] != [row.id for row in after]:
        raise DataError(
            f"gate: the held-out rows{which} of {first.label} and {second.label} differ; evaluate "
            "both on one dataset"
        )
    if [row.tokens for row in before] == [row.tokens for row in after]:
        return PairedRows(before, after, "token")
    other = [(one, two) for one, two in zip(before, after, strict=True) if one.bytes != two.bytes]
    if other:
        one, two = other[0]
        raise DataError(
            f"gate: {first.label} and {second.label} cut the held-out rows{which} into different "
            f"tokens and did not score the same text: of {len(other):,} of {len(before):,} rows, "
            f"such as `{one.id}` with {one.bytes:,} and {two.bytes:,} bytes. A row that is longer "
            "than a model reads is scored as far as it reads; hold out shorter rows, or set "
            "`gate.perplexity: ignore`"
        )
    return PairedRows(before, after, "byte")


def check_perplexities(
    first: Evaluation, second: Evaluation, rule: Rule, config: GateConfig
) -> list[PerplexityCheck]:
    """Each dataset by itself, before any correction for several; the main one first if there is.

    Args:
        first: The base, or another model that is compared with.
        second: The candidate.
        rule: What is asked on the main dataset; on the others perplexity must not rise.
        config: Confidence and bootstrap.

    Raises:
        DataError: the two did not score the same text.
    """
    before, after = first.results, second.results
    results: list[tuple[str, PerplexityResult | None, PerplexityResult | None]] = [
        ("", before.perplexity, after.perplexity)
    ]
    results += [
        (name, one, after.other_perplexities.get(name))
        for name, one in before.other_perplexities.items()
    ]
    checks = []
    for name, one, two in results:
        rows = paired_rows(first, second, name)
        if one is not None and two is not None:
            asked: Rule = "must_not_rise" if name else rule
            checks.append(_check(name, one, two, rows, asked, config))
    return checks


def unproven_perplexity(check: PerplexityCheck) -> PerplexityCheck:
    """A failed check that does not stand beside so many others."""
    sentence = f"{_seen(check)}; a rise, but not beyond chance among so many checks"
    return check.model_copy(update={"verdict": "not enough evidence", "sentence": sentence})


def _of_dataset(evaluation: Evaluation, dataset: str) -> list[PerplexityRow]:
    others = evaluation.results.other_perplexities
    return [
        row for row in evaluation.rows if (row.dataset if row.dataset in others else "") == dataset
    ]


def _check(
    name: str,
    before: PerplexityResult,
    after: PerplexityResult,
    rows: PairedRows,
    rule: Rule,
    config: GateConfig,
) -> PerplexityCheck:
    tolerance = PERPLEXITY_TOLERANCE if rule == "must_not_rise" else 0.0
    values = (before.perplexity, after.perplexity)
    plain = before.nats_per_token - after.nats_per_token
    if rows.unit == "byte":
        values = (before.bits_per_byte, after.bits_per_byte)
        plain = before.bits_per_byte - after.bits_per_byte
    difference: PairedDifference | None = None
    verdict: Outcome = "not enough evidence"
    needed, detectable = None, None
    if len(rows.before) >= MIN_PERPLEXITY_ROWS:
        difference = rows.difference(config, tolerance)
        allowed = tolerance * rows.unit_nats
        verdict = statistics.non_inferiority(difference, allowed)
        smallest = statistics.smallest_detectable_drop(difference.standard_error, config.confidence)
        detectable = math.expm1(smallest / rows.unit_nats)
        if verdict == "not enough evidence":
            needed = statistics.items_needed(difference, allowed, config.confidence)
    check = PerplexityCheck(
        requirement=rule,
        base=values[0],
        candidate=values[1],
        difference=plain,
        low=difference.low if difference else None,
        high=difference.high if difference else None,
        rows=len(rows.before),
        p_worse=difference.p_worse if difference else 1.0,
        verdict=verdict,
        sentence="",
        dataset=name,
        unit=rows.unit,
        smallest_detectable_rise=detectable,
        rows_needed=needed,
    )
    return check.model_copy(update={"sentence": _seen(check) + _found(check)})


def _seen(check: PerplexityCheck) -> str:
    of = f" of {check.dataset}" if check.dataset else ""
    unit = " bits a byte" if check.unit == "byte" else ""
    values = f"{three_digits(check.base)} -> {three_digits(check.candidate)}{unit}"
    return f"perplexity{of}: {values} on {check.rows:,} rows"


def _found(check: PerplexityCheck) -> str:
    if check.smallest_detectable_rise is None:
        return f"; fewer than {MIN_PERPLEXITY_ROWS} held-out rows show nothing"
    improves = check.requirement == "must_improve"
    rise = "a rise" if improves else f"a rise beyond {PERPLEXITY_TOLERANCE:.0%}"
    if check.verdict == "fail":
        return f"; {rise} is shown"
    what = "change" if improves else "rise"
    power = f"(would have seen a {what} of {check.smallest_detectable_rise:.1%})"
    if check.verdict == "pass":
        return f"; {'an improvement is shown' if improves else f'{rise} is ruled out'} {power}"
    still = "an improvement is not shown" if improves else f"{rise} remains possible"
    settle = "more rows would hardly settle it"
    if check.rows_needed is not None:
        settle = f"about {check.rows_needed:,} rows would settle it"
    return f"; {still}; {settle} {power}"
