"""From two evaluations to a verdict: which items pair, what each check says, what it adds up to.

To pass, *every* check has to rule out a drop beyond what is allowed. Asking for all of them at
once needs no correction for their number (an intersection-union test: Berger, Technometrics 24,
1982, 295-300): more benchmarks never make passing easier. Failing is different: with twenty
benchmarks one of them shows a drop by chance alone. So a check fails only where the drop stands
after Holm's correction over all checks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from posttrain.errors import DataError
from posttrain.evaluate import statistics
from posttrain.evaluate.items import PerplexityRow, read_items, read_perplexity
from posttrain.evaluate.pairing import Pair, paired_items
from posttrain.evaluate.results import (
    Check,
    EvaluationResults,
    Outcome,
    PerplexityCheck,
    PerplexityResult,
    TaskResult,
    Verdict,
    Watched,
    three_digits,
)
from posttrain.evaluate.statistics import PairedDifference
from posttrain.recipe.gate import GateConfig

PERPLEXITY_TOLERANCE = 0.01
"""Nats a token by which perplexity may rise under `must_not_rise`: one percent. With no tolerance
at all a model could never be shown not to have risen."""

MIN_PERPLEXITY_ROWS = 10
"""Held-out rows below which no interval of perplexity is believed."""


def judge(
    base: Path, candidate: Path, config: GateConfig, watched: tuple[Watched, ...] = ()
) -> Verdict:
    """Compare two evaluations, given as folders, item by item.

    Args:
        base: Evaluation of the base.
        candidate: Evaluation of the candidate.
        config: What is asked of the candidate.
        watched: What was found by the stages that learned from rewards on the way to it.

    Raises:
        DataError: the two were made with different settings or on different items, or there is
            nothing to compare.
    """
    before, after = EvaluationResults.load(base), EvaluationResults.load(candidate)
    _check_comparable(before, after)
    pairs = paired_items(read_items(base), read_items(candidate))
    differences = [task_difference(task, pairs[task.task], config) for task in before.tasks]
    perplexity = _perplexity(before, after, base, candidate, config)
    if not differences and perplexity is None:
        raise DataError(
            "gate: nothing to compare; give the evaluate stage `tasks` or a `dataset`"
            + (", or do not ignore `perplexity`" if before.perplexity else "")
        )
    shown = _shown_drops(differences, perplexity, config)
    checks = tuple(
        _check(task, pairs[task.task], difference, drop, config)
        for task, difference, drop in zip(before.tasks, differences, shown, strict=False)
    )
    if perplexity is not None and perplexity.verdict == "fail" and not shown[-1]:
        perplexity = _without_proof(perplexity)
    return _add_up(checks, perplexity, watched, config)


def task_difference(
    task: TaskResult, pairs: Sequence[Pair], config: GateConfig
) -> PairedDifference:
    """Candidate minus base on a task's items, positive is better."""
    sign = 1.0 if task.higher_is_better else -1.0
    return statistics.paired_difference(
        [sign * first.value for first, _ in pairs],
        [sign * second.value for _, second in pairs],
        groups=[first.group for first, _ in pairs],
        max_drop=config.max_drop,
        confidence=config.confidence,
        bootstrap_samples=config.bootstrap_samples,
        seed=config.seed,
    )


def _check_comparable(before: EvaluationResults, after: EvaluationResults) -> None:
    if before.settings_digest == after.settings_digest:
        return
    lines = "".join(f"\n  {line}" for line in before.settings.differences(after.settings))
    raise DataError(
        "gate: base and candidate were evaluated with different settings, so their difference "
        f"would mean nothing; evaluate both with the same recipe (base first below):{lines}"
    )


def _shown_drops(
    differences: Sequence[PairedDifference], perplexity: PerplexityCheck | None, config: GateConfig
) -> list[bool]:
    """For each check, perplexity last, whether its drop stands after Holm's correction."""
    p_values = [difference.p_worse for difference in differences]
    if perplexity is not None:
        p_values.append(perplexity.p_worse)
    return statistics.holm(p_values, alpha=1 - config.confidence)


def _check(
    task: TaskResult,
    pairs: Sequence[Pair],
    difference: PairedDifference,
    drop_shown: bool,
    config: GateConfig,
) -> Check:
    verdict = statistics.non_inferiority(difference, config.max_drop)
    corrected = verdict == "fail" and not drop_shown
    verdict = "not enough evidence" if corrected else verdict
    detectable = statistics.smallest_detectable_drop(difference.standard_error, config.confidence)
    needed = None
    if verdict == "not enough evidence" and not corrected:
        needed = statistics.items_needed(difference, config.max_drop, config.confidence)
    return Check(
        task=task.task,
        metric=task.metric,
        base=task.value,
        candidate=math.fsum(second.value for _, second in pairs) / len(pairs),
        difference=difference.mean,
        low=difference.low,
        high=difference.high,
        n=difference.n,
        p_worse=difference.p_worse,
        mcnemar_p=_mcnemar(pairs),
        smallest_detectable_drop=detectable,
        items_needed=needed,
        verdict=verdict,
        sentence=_sentence(task.task, difference, verdict, corrected, needed, config),
    )


def _mcnemar(pairs: Sequence[Pair]) -> float | None:
    values = [item.value for pair in pairs for item in pair]
    if any(value not in (0.0, 1.0) for value in values):
        return None
    return statistics.mcnemar_exact(
        [first.value for first, _ in pairs], [second.value for _, second in pairs]
    )


def _sentence(
    task: str,
    difference: PairedDifference,
    verdict: Outcome,
    corrected: bool,
    needed: int | None,
    config: GateConfig,
) -> str:
    seen = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    over = f"on {difference.n:,} items"
    if verdict == "pass":
        return f"{task}: {seen} {over}; a drop beyond {config.max_drop:g} is ruled out"
    if verdict == "fail":
        return f"{task}: {seen} {over}; a drop beyond {config.max_drop:g} is shown"
    if corrected:
        return f"{task}: {seen} {over}; a drop, but not beyond chance among so many checks"
    sentence = f"{task}: {seen} {over} leaves a drop beyond {config.max_drop:g} possible"
    if needed is None:
        return f"{sentence}; more items would hardly settle it"
    return f"{sentence}; about {needed:,} items would settle it"


def _perplexity(
    before: EvaluationResults,
    after: EvaluationResults,
    base: Path,
    candidate: Path,
    config: GateConfig,
) -> PerplexityCheck | None:
    """The check of perplexity, or None where there is none or it is to be ignored."""
    if config.perplexity == "ignore":
        return None
    first, second = read_perplexity(base), read_perplexity(candidate)
    _check_same_rows(first, second)
    if before.perplexity is None or after.perplexity is None:
        return None
    tolerance = PERPLEXITY_TOLERANCE if config.perplexity == "must_not_rise" else 0.0
    difference: PairedDifference | None = None
    if len(first) >= MIN_PERPLEXITY_ROWS:
        difference = statistics.paired_nats(
            [row.nats for row in first],
            [row.nats for row in second],
            [row.tokens for row in first],
            max_rise=tolerance,
            confidence=config.confidence,
            bootstrap_samples=config.bootstrap_samples,
            seed=config.seed,
        )
    verdict: Outcome = "not enough evidence"
    if difference is not None:
        verdict = statistics.non_inferiority(difference, tolerance)
    return PerplexityCheck(
        requirement=config.perplexity,
        base=before.perplexity.perplexity,
        candidate=after.perplexity.perplexity,
        difference=before.perplexity.nats_per_token - after.perplexity.nats_per_token,
        low=difference.low if difference else None,
        high=difference.high if difference else None,
        rows=len(first),
        p_worse=difference.p_worse if difference else 1.0,
        verdict=verdict,
        sentence=_perplexity_sentence(
            before.perplexity, after.perplexity, len(first), verdict, config
        ),
    )


def _check_same_rows(first: Sequence[PerplexityRow], second: Sequence[PerplexityRow]) -> None:
    if [row.id for row in first] != [row.id for row in second]:
        raise DataError(
            "gate: the held-out rows of base and candidate differ; evaluate both on one dataset"
        )
    if [row.tokens for row in first] != [row.tokens for row in second]:
        raise DataError(
            "gate: base and candidate cut the held-out rows into different tokens, so their "
            "perplexities cannot be compared; set `gate.perplexity: ignore`"
        )


def _perplexity_sentence(
    before: PerplexityResult,
    after: PerplexityResult,
    rows: int,
    verdict: Outcome,
    config: GateConfig,
) -> str:
    values = f"{three_digits(before.perplexity)} -> {three_digits(after.perplexity)}"
    seen = f"perplexity: {values} on {rows:,} rows"
    if rows < MIN_PERPLEXITY_ROWS:
        return f"{seen}; fewer than {MIN_PERPLEXITY_ROWS} held-out rows show nothing"
    if config.perplexity == "must_improve":
        event = {"pass": "an improvement is shown", "fail": "a rise is shown"}
        return f"{seen}; {event.get(verdict, 'an improvement is not shown')}"
    rise = f"a rise beyond {PERPLEXITY_TOLERANCE:.0%}"
    event = {"pass": f"{rise} is ruled out", "fail": f"{rise} is shown"}
    return f"{seen}; {event.get(verdict, f'{rise} remains possible')}"


def _without_proof(check: PerplexityCheck) -> PerplexityCheck:
    """A failed check that does not stand beside so many others."""
    values = f"{three_digits(check.base)} -> {three_digits(check.candidate)}"
    sentence = f"perplexity: {values}; a rise, but not beyond chance among so many checks"
    return check.model_copy(update={"verdict": "not enough evidence", "sentence": sentence})


def _add_up(
    checks: tuple[Check, ...],
    perplexity: PerplexityCheck | None,
    watched: tuple[Watched, ...],
    config: GateConfig,
) -> Verdict:
    outcomes: list[tuple[Outcome, str]] = [(check.verdict, check.sentence) for check in checks]
    if perplexity is not None:
        outcomes.append((perplexity.verdict, perplexity.sentence))
    if config.reward_hacking == "fail":
        outcomes += [("fail", one.sentence) for one in watched if one.hacking.flagged]
    verdict: Outcome = "pass"
    for worst in ("fail", "not enough evidence"):
        if any(outcome == worst for outcome, _ in outcomes):
            verdict = worst
            break
    return Verdict(
        verdict=verdict,
        reasons=tuple(sentence for outcome, sentence in outcomes if outcome == verdict),
        checks=checks,
        perplexity=perplexity,
        max_drop=config.max_drop,
        confidence=config.confidence,
        watched=watched,
    )
