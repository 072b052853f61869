"""What a task's items say: no drop beyond what is allowed, or better than before."""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain.evaluate import statistics
from posttrain.evaluate.pairing import Pair
from posttrain.evaluate.results import Check, Outcome, Requirement, TaskResult
from posttrain.evaluate.statistics import PairedDifference
from posttrain.recipe.gate import GateConfig


def task_difference(
    task: TaskResult, pairs: Sequence[Pair], config: GateConfig, max_drop: float = 0.0
) -> PairedDifference:
    """Candidate minus base on a task's items, positive is better.

    Args:
        task: Says which direction is better.
        pairs: The task's items; groups of items, such as subjects, are resampled whole.
        config: Confidence and bootstrap.
        max_drop: What the p-value is against.
    """
    sign = 1.0 if task.higher_is_better else -1.0
    return statistics.paired_difference(
        [sign * first.value for first, _ in pairs],
        [sign * second.value for _, second in pairs],
        groups=[first.group for first, _ in pairs],
        max_drop=max_drop,
        confidence=config.confidence,
        bootstrap_samples=config.bootstrap_samples,
        seed=config.seed,
    )


def check_task(
    task: TaskResult,
    pairs: Sequence[Pair],
    requirement: Requirement,
    max_drop: float,
    config: GateConfig,
) -> Check:
    """One benchmark by itself, before any correction for several.

    Args:
        task: As the base was measured.
        pairs: Its items.
        requirement: What is asked of the candidate.
        max_drop: The drop that has to be ruled out; 0 where it must improve.
        config: Confidence and bootstrap.
    """
    difference = task_difference(task, pairs, config, max_drop)
    verdict = statistics.non_inferiority(difference, max_drop)
    detectable = statistics.smallest_detectable_drop(difference.standard_error, config.confidence)
    needed = None
    if verdict == "not enough evidence":
        needed = statistics.items_needed(difference, max_drop, config.confidence)
    seen = _seen(task.task, difference.mean, difference.low, difference.high, difference.n)
    return Check(
        task=task.task,
        metric=task.metric,
        base=math.fsum(first.value for first, _ in pairs) / len(pairs),
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
        sentence=seen + _found(verdict, requirement, max_drop, needed, detectable),
        requirement=requirement,
        max_drop=max_drop,
    )


def unproven_task(check: Check) -> Check:
    """A failed check that does not stand beside so many others."""
    seen = _seen(check.task, check.difference, check.low, check.high, check.n)
    sentence = f"{seen}; a drop, but not beyond chance among so many checks"
    return check.model_copy(update={"verdict": "not enough evidence", "sentence": sentence})


def _mcnemar(pairs: Sequence[Pair]) -> float | None:
    values = [item.value for pair in pairs for item in pair]
    if any(value not in (0.0, 1.0) for value in values):
        return None
    return statistics.mcnemar_exact(
        [first.value for first, _ in pairs], [second.value for _, second in pairs]
    )


def _seen(task: str, mean: float, low: float, high: float, n: int) -> str:
    return f"{task}: {mean:+.3f} [{low:+.3f}, {high:+.3f}] on {n:,} items"


def _found(
    verdict: Outcome,
    requirement: Requirement,
    max_drop: float,
    needed: int | None,
    detectable: float,
) -> str:
    improves = requirement == "must_improve"
    drop = "a drop" if improves else f"a drop beyond {max_drop:g}"
    if verdict == "fail":
        return f"; {drop} is shown"
    power = f"(would have seen a {'gain' if improves else 'drop'} of {detectable:.3f})"
    if verdict == "pass":
        return f"; {'an improvement is shown' if improves else f'{drop} is ruled out'} {power}"
    settle = "more items would hardly settle it"
    if needed is not None:
        settle = f"about {needed:,} items would settle it"
    if improves:
        return f"; an improvement is not shown; {settle} {power}"
    return f" leaves {drop} possible; {settle} {power}"
