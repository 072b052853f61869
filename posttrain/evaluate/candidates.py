"""Several candidates against one base: which of them pass, and which one to go on with.

One candidate that passes is enough, so each further one is a further chance to pass by luck. That
is corrected by Holm's procedure: of `m` candidates one passes where a drop is ruled out with an
error of (1 - confidence) / m, the others then have m - 1 to share, and so on. The bounds that a
verdict shows are those that decided it.

Among those that pass the best mean difference is no reason to choose one that cost more, if chance
explains it. So the best one is compared with each other one on the same items, and the choice is
the first, in the recipe's order, of all that cannot be told from the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist, fmean

from posttrain.evaluate import statistics
from posttrain.evaluate.items import read_items, read_perplexity
from posttrain.evaluate.pairing import paired_items
from posttrain.evaluate.results import Comparison, EvaluationResults, Outcome, Verdict, Watched
from posttrain.evaluate.verdict import judge, task_difference
from posttrain.recipe.gate import GateConfig


def judge_several(
    base: Path,
    candidates: Mapping[str, Path],
    config: GateConfig,
    watched: Mapping[str, tuple[Watched, ...]],
) -> Verdict:
    """Compare evaluations with the base's and, where several pass, with each other.

    Args:
        base: Evaluation of the base, as a folder.
        candidates: Evaluations of the candidates by name, in the recipe's order.
        config: What is asked of each candidate.
        watched: For each candidate, what was found by the stages that learned from rewards.

    Raises:
        DataError: two of them cannot be compared, or there is nothing to compare.
    """
    verdicts = _judged(base, candidates, config, watched)
    passing = [name for name in candidates if verdicts[name].verdict == "pass"]
    comparisons: tuple[Comparison, ...] = ()
    choice = None
    if passing:
        best = max(passing, key=lambda name: _merit(verdicts[name]))
        others = [name for name in passing if name != best]
        comparisons = tuple(
            _compare(best, other, candidates, config, len(others)) for other in others
        )
        as_good = {best, *(one.other for one in comparisons if not one.better)}
        choice = next(name for name in candidates if name in as_good)
    shown = verdicts[choice or next(iter(candidates))]
    return Verdict(
        verdict=_overall([verdict.verdict for verdict in verdicts.values()]),
        reasons=_reasons(verdicts, choice, comparisons),
        checks=shown.checks,
        perplexity=shown.perplexity,
        max_drop=config.max_drop,
        confidence=shown.confidence,
        choice=choice,
        candidates=verdicts,
        comparisons=comparisons,
    )


def _judged(
    base: Path,
    candidates: Mapping[str, Path],
    config: GateConfig,
    watched: Mapping[str, tuple[Watched, ...]],
) -> dict[str, Verdict]:
    """Holm's procedure: as long as a candidate passes, those left are judged less strictly."""
    verdicts: dict[str, Verdict] = {}
    left = list(candidates)
    while left:
        strict = _raised(config, len(left))
        for name in left:
            verdicts[name] = judge(base, candidates[name], strict, watched.get(name, ()))
        still = [name for name in left if verdicts[name].verdict != "pass"]
        if still == left:
            break
        left = still
    return {name: verdicts[name] for name in candidates}


def _raised(config: GateConfig, shares: float) -> GateConfig:
    """The same with its error divided by `shares`."""
    if shares == 1:
        return config
    return config.model_copy(update={"confidence": 1 - (1 - config.confidence) / shares})


def _merit(verdict: Verdict) -> float:
    """Mean difference over the tasks; without tasks, the nats a token by which it is better."""
    if verdict.checks:
        return fmean(check.difference for check in verdict.checks)
    return verdict.perplexity.difference if verdict.perplexity else 0.0


def _overall(outcomes: Sequence[Outcome]) -> Outcome:
    if "pass" in outcomes:
        return "pass"
    return "fail" if set(outcomes) == {"fail"} else "not enough evidence"


def _reasons(
    verdicts: Mapping[str, Verdict], choice: str | None, comparisons: Sequence[Comparison]
) -> tuple[str, ...]:
    if choice is None:
        return tuple(
            f"{name}: {reason}" for name, verdict in verdicts.items() for reason in verdict.reasons
        )
    chosen = [f"{choice}: {reason}" for reason in verdicts[choice].reasons]
    told = [one.sentence for one in comparisons]
    equal = any(not one.better for one in comparisons)
    last = [f"the choice is {choice}, which stands first among equals"] if equal else []
    return (*chosen, *told, *last)


def _compare(
    best: str, other: str, candidates: Mapping[str, Path], config: GateConfig, others: int
) -> Comparison:
    """Two candidates on the same items.

    Which one is the better was read off the same items, so the test is two-sided; and the error is
    shared among all others that the best one is compared with (Bonferroni).
    """
    strict = _raised(config, 2 * others)
    first, second = candidates[other], candidates[best]
    tasks = EvaluationResults.load(first).tasks
    if tasks:
        pairs = paired_items(read_items(first), read_items(second))
        over = f"{len(tasks)} task" if len(tasks) == 1 else f"the mean of {len(tasks)} tasks"
        found = _mean([task_difference(task, pairs[task.task], strict) for task in tasks], strict)
    else:
        over = "held-out rows, in nats a token"
        found = _of_rows(first, second, strict)
    mean, low, high = found
    better = low > 0
    seen = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] over {over}"
    sentence = f"{best} and {other} cannot be told apart: {seen}"
    if better:
        sentence = f"{best} is better than {other}: {seen}"
    return Comparison(
        best=best,
        other=other,
        difference=mean,
        low=low,
        high=high,
        better=better,
        sentence=sentence,
    )


_Bounds = tuple[float, float, float]
"""Mean, low, high."""


def _mean(differences: Sequence[statistics.PairedDifference], config: GateConfig) -> _Bounds:
    """Mean over tasks. Their items are other questions, so the variances of the means add up."""
    if len(differences) == 1:
        return differences[0].mean, differences[0].low, differences[0].high
    mean = fmean(difference.mean for difference in differences)
    error = math.hypot(*(difference.standard_error for difference in differences))
    half = NormalDist().inv_cdf(config.confidence) * error / len(differences)
    return mean, mean - half, mean + half


def _of_rows(first: Path, second: Path, config: GateConfig) -> _Bounds:
    """Held-out rows, of which there are enough: both candidates pass on them."""
    before, after = read_perplexity(first), read_perplexity(second)
    found = statistics.paired_nats(
        [row.nats for row in before],
        [row.nats for row in after],
        [row.tokens for row in before],
        confidence=config.confidence,
        bootstrap_samples=config.bootstrap_samples,
        seed=config.seed,
    )
    return found.mean, found.low, found.high
