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

from collections.abc import Mapping, Sequence
from statistics import fmean

from posttrain.evaluate.results import Comparison, Outcome, Verdict
from posttrain.evaluate.verdict import Candidate, Opponents, decide
from posttrain.evaluate.versus import difference_on_the_whole
from posttrain.recipe.gate import GateConfig


def judge_several(
    opponents: Opponents, candidates: Mapping[str, Candidate], config: GateConfig
) -> Verdict:
    """Compare candidates with base and champion and, where several pass, with each other.

    Args:
        opponents: What each of them is compared with.
        candidates: By name, in the recipe's order.
        config: What is asked of each candidate.

    Raises:
        DataError: two of them cannot be compared, or there is nothing to compare.
    """
    verdicts = _judged(opponents, candidates, config)
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
        other_perplexities=shown.other_perplexities,
        against=config.against,
        win_rate=shown.win_rate,
        champion=shown.champion,
    )


def _judged(
    opponents: Opponents, candidates: Mapping[str, Candidate], config: GateConfig
) -> dict[str, Verdict]:
    """Holm's procedure: as long as a candidate passes, those left are judged less strictly."""
    verdicts: dict[str, Verdict] = {}
    left = list(candidates)
    while left:
        strict = _raised(config, len(left))
        for name in left:
            verdicts[name] = decide(opponents, candidates[name], strict)
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
    """Mean difference over the tasks; without tasks, that of perplexity, or else the win rate."""
    if verdict.checks:
        return fmean(check.difference for check in verdict.checks)
    perplexities = [verdict.perplexity, *verdict.other_perplexities]
    of_rows = [check.difference for check in perplexities if check]
    won = verdict.win_rate.win_rate if verdict.win_rate else None
    return of_rows[0] if of_rows else won or 0.0


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
    best: str, other: str, candidates: Mapping[str, Candidate], config: GateConfig, others: int
) -> Comparison:
    """Two candidates on the same items.

    Which one is the better was read off the same items, so the test is two-sided; and the error is
    shared among all others that the best one is compared with (Bonferroni).
    """
    strict = _raised(config, 2 * others)
    first, second = candidates[other].evaluation, candidates[best].evaluation
    found, over = difference_on_the_whole(first, second, strict)
    if found is None:
        sentence = f"{best} and {other} cannot be told apart: neither tasks nor enough {over}"
        return Comparison(
            best=best, other=other, difference=0, low=-1, high=1, better=False, sentence=sentence
        )
    better = found.low > 0
    seen = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}] over {over}"
    sentence = f"{best} and {other} cannot be told apart: {seen}"
    if better:
        sentence = f"{best} is better than {other}: {seen}"
    return Comparison(
        best=best,
        other=other,
        difference=found.mean,
        low=found.low,
        high=found.high,
        better=better,
        sentence=sentence,
    )
