"""The statistics of the gate: paired differences, and what may be concluded from them.

Base and candidate answer the same items, so everything here works on the difference of each item:
what is hard for both cancels. Differences are oriented so that positive is better. An interval
`[low, high]` holds two one-sided bounds, each at `confidence`: 0.95 gives what is elsewhere called
a 90% interval, the one that belongs to a non-inferiority test.

No torch here: arrays in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Decision = Literal["pass", "fail", "not enough evidence"]
Floats = NDArray[np.float64]

POWER = 0.8
"""Chance of a clear answer at which `items_needed` and `smallest_detectable_drop` aim."""

_CELLS_PER_CHUNK = 4_000_000
_INDEX_FOR_COUNT = 8
"""Drawing one unit's index costs about an eighth of drawing how often one kind of unit occurs."""
_MOST_ITEMS = 1_000_000


@dataclass(frozen=True)
class PairedDifference:
    """Candidate minus base over `n` items, positive is better."""

    mean: float
    low: float
    """One-sided lower bound."""
    high: float
    """One-sided upper bound."""
    n: int
    standard_error: float
    """Of the mean; never below what the interval itself claims, so never a vacuous zero."""
    p_worse: float
    """One-sided p-value against "the drop is at most `max_drop`"; small speaks for a real drop."""


def paired_difference(
    base: ArrayLike,
    candidate: ArrayLike,
    groups: Sequence[str] | None = None,
    *,
    max_drop: float = 0.0,
    confidence: float = 0.95,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Mean difference of paired scores in [0, 1], with bounds that hold for few items as well.

    The interval is the percentile bootstrap's, over items, or over whole groups when there are
    several (items of one MMLU subject stand and fall together). The bootstrap only ever sees
    outcomes that occurred: five identical items give it the interval [0, 0], one lucky item in
    five gives it a lower bound of zero. So the interval is widened to at least

    - for right/wrong scores, Tango's score interval for paired proportions (Statistics in
      Medicine 17, 1998, 891-908), which counts on outcomes not yet seen;
    - for other scores, Student's t interval;
    - where all items differ alike, or not at all, the exact bound on the share of items that might
      do otherwise (the "rule of three", Clopper and Pearson): with n = 5 that is 45 points, with
      n = 149 two.

    With few groups (say under ten) the variance between them is poorly known and the bounds lean
    on the item-level interval.

    Args:
        base: Scores of the base model, shape (n,).
        candidate: Scores of the candidate on the same items in the same order, shape (n,).
        groups: Group of each item, such as its subject. One group, or none, means items are
            resampled singly.
        max_drop: The drop that `p_worse` tests against.
        confidence: Of each one-sided bound.
        bootstrap_samples: Resamples.
        seed: Of the resampling.

    Raises:
        ValueError: no items, or arrays of different lengths.
    """
    before, after = _paired(base, candidate)
    member = _members(groups, len(before))
    # In an order of their own: a sum of floats depends on the order of its terms.
    order = np.lexsort((after, before, member))
    before, after, member = before[order], after[order], member[order]
    difference = after - before
    n = len(difference)
    mean = float(difference.mean())
    numerator, denominator = _group_sums(difference, member)
    resampled = _bootstrap_ratio(numerator, denominator, bootstrap_samples, seed)
    floor = _floor_interval(before, after, confidence)
    low = min(_quantile(resampled, 1 - confidence), floor.low, mean)
    high = max(_quantile(resampled, confidence), floor.high, mean)
    return PairedDifference(
        mean=mean,
        low=low,
        high=high,
        n=n,
        standard_error=_standard_error(resampled, mean, low, high, confidence),
        p_worse=max(_bootstrap_p(resampled, -max_drop), _floor_p(before, after, -max_drop)),
    )


def paired_nats(
    base: ArrayLike,
    candidate: ArrayLike,
    tokens: ArrayLike,
    *,
    max_rise: float = 0.0,
    confidence: float = 0.95,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Nats a token by which the candidate is better, over all rows together.

    The ratio estimator sum(base - candidate) / sum(tokens), so that exp(-mean) is the ratio of the
    two perplexities; rows, not tokens, are resampled. The interval is at least as wide as Student's
    t for the ratio (linearised variance: Cochran, Sampling Techniques, 1977, section 6.3).

    Rows that are all equal give an interval of zero width, and unlike for right and wrong that is
    no accident of a small sample: any change of the weights moves the likelihood of every row.

    Args:
        base: Summed negative log-likelihood of each row under the base, in nats, shape (rows,).
        candidate: The same under the candidate.
        tokens: Scored tokens of each row, shape (rows,).
        max_rise: The rise, in nats a token, that `p_worse` tests against.
        confidence: Of each one-sided bound.
        bootstrap_samples: Resamples.
        seed: Of the resampling.

    Raises:
        ValueError: fewer than two rows, arrays of different lengths, or a row without tokens.
    """
    before, after = _paired(base, candidate)
    if len(before) < 2:
        raise ValueError("one row says nothing about the next: an interval needs two or more")
    weights = np.asarray(tokens, dtype=np.float64)
    if weights.shape != before.shape or not (weights > 0).all():
        raise ValueError("every row needs a positive number of scored tokens")
    order = np.lexsort((after, before, weights))
    saved, weights = (before - after)[order], weights[order]
    mean = float(saved.sum() / weights.sum())
    resampled = _bootstrap_ratio(saved, weights, bootstrap_samples, seed)
    floor = _student(saved, weights, confidence)
    low = min(_quantile(resampled, 1 - confidence), floor.low)
    high = max(_quantile(resampled, confidence), floor.high)
    return PairedDifference(
        mean=mean,
        low=low,
        high=high,
        n=len(saved),
        standard_error=_standard_error(resampled, mean, low, high, confidence),
        p_worse=max(_bootstrap_p(resampled, -max_rise), _student_p(saved, weights, null=-max_rise)),
    )


def mcnemar_exact(base_correct: ArrayLike, candidate_correct: ArrayLike) -> float:
    """Two-sided exact McNemar test of "equally often right", for one column of 0 and 1 each.

    Under the hypothesis each item on which the two disagree is a fair coin's toss. Reported beside
    the verdict, never deciding it: not being shown different is not being shown equal.
    """
    before, after = _paired(base_correct, candidate_correct)
    worse = int(((before > 0.5) & (after < 0.5)).sum())
    better = int(((before < 0.5) & (after > 0.5)).sum())
    if worse + better == 0:
        return 1.0
    return float(stats.binomtest(worse, worse + better, 0.5).pvalue)


def non_inferiority(difference: PairedDifference, max_drop: float) -> Decision:
    """Pass: a larger drop than `max_drop` is ruled out. Fail: it is shown. Else: not known yet."""
    if difference.low > -max_drop:
        return "pass"
    if difference.high < -max_drop:
        return "fail"
    return "not enough evidence"


def items_needed(
    difference: PairedDifference, max_drop: float, confidence: float, power: float = POWER
) -> int | None:
    """Items that would probably settle a `not enough evidence`, to two digits; None: out of reach.

    The usual sample size of a one-sided test, (z_confidence + z_power)^2 variance / gap^2, with the
    variance that was seen. The gap supposes that the true difference is the one seen. Where a drop
    is to be ruled out it is never better than no change: hoping for a lucky gain to continue would
    promise too much. Where a gain is asked for (`max_drop` of 0 or less) the gain is what is seen.
    """
    expected = min(difference.mean, 0.0) if max_drop > 0 else difference.mean
    gap = abs(max_drop + expected)
    if gap == 0:
        return None
    z = _z(confidence) + _z(power)
    needed = difference.n * (z * difference.standard_error / gap) ** 2
    return _round_up(needed) if needed <= _MOST_ITEMS else None


def smallest_detectable_drop(
    standard_error: float, confidence: float, power: float = POWER
) -> float:
    """Drop that this many items would show, at `confidence`, with a chance of `power`."""
    return (_z(confidence) + _z(power)) * standard_error


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses fall when the chance of any false rejection is to stay below `alpha`.

    Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979, 65-70).
    """
    rejected = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for step, index in enumerate(order):
        if p_values[index] > alpha / (len(p_values) - step):
            break
        rejected[index] = True
    return rejected


def mean_of_tasks(differences: Sequence[PairedDifference], confidence: float) -> PairedDifference:
    """Mean over tasks, each with the same weight; `p_worse` is against "it is not below 0".

    Their items are other questions, so the variances of the means add up.
    """
    mean = math.fsum(one.mean for one in differences) / len(differences)
    error = math.hypot(*(one.standard_error for one in differences)) / len(differences)
    low, high = mean - _z(confidence) * error, mean + _z(confidence) * error
    if len(differences) == 1:
        low, high = differences[0].low, differences[0].high
    return PairedDifference(
        mean=mean,
        low=low,
        high=high,
        n=sum(one.n for one in differences),
        standard_error=error,
        p_worse=float(stats.norm.cdf(mean / error)),
    )


@dataclass(frozen=True)
class _Interval:
    low: float
    high: float


def _paired(base: ArrayLike, candidate: ArrayLike) -> tuple[Floats, Floats]:
    before = np.asarray(base, dtype=np.float64)
    after = np.asarray(candidate, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape or before.size == 0:
        raise ValueError(f"paired scores of shapes {before.shape} and {after.shape}")
    return before, after


def _members(groups: Sequence[str] | None, n: int) -> NDArray[np.int64]:
    """Number of each item's group, shape (n,)."""
    if groups is None:
        return np.zeros(n, dtype=np.int64)
    return np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)


def _group_sums(difference: Floats, member: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Sum and size of each resampling unit: an item, or a group where there are several."""
    if member.max() == 0:
        return difference, np.ones_like(difference)
    sizes = np.bincount(member).astype(np.float64)
    sums: Floats = np.bincount(member, weights=difference).astype(np.float64)
    return sums, sizes


def _bootstrap_ratio(numerator: Floats, denominator: Floats, samples: int, seed: int) -> Floats:
    """Resampled sum(numerator) / sum(denominator), shape (samples,).

    Where units are equal, as right/wrong items are, it is drawn how often each of the few kinds
    occurs (a multinomial), which leaves three columns instead of n, and the same distribution.
    """
    rng = np.random.default_rng(seed)
    units, counts = np.unique(
        np.stack([numerator, denominator], axis=1), axis=0, return_counts=True
    )
    total = int(counts.sum())
    by_kind = _INDEX_FOR_COUNT * len(units) < total
    single = np.repeat(units, counts, axis=0)
    out = np.empty(samples)
    chunk = max(1, _CELLS_PER_CHUNK // (len(units) if by_kind else total))
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        if by_kind:
            sums = rng.multinomial(total, counts / total, size=size) @ units
            above, below = sums[:, 0], sums[:, 1]
        else:
            drawn = rng.integers(0, total, size=(size, total), dtype=np.int32)
            above, below = single[:, 0].take(drawn).sum(1), single[:, 1].take(drawn).sum(1)
        out[start : start + size] = above / below
    return out


def _quantile(resampled: Floats, level: float) -> float:
    return float(np.quantile(resampled, level))


def _bootstrap_p(resampled: Floats, null: float) -> float:
    return float((1 + (resampled >= null).sum()) / (1 + len(resampled)))


def _standard_error(
    resampled: Floats, mean: float, low: float, high: float, confidence: float
) -> float:
    """The bootstrap's, or what the (widened) interval amounts to, whichever is larger."""
    implied = max(mean - low, high - mean) / _z(confidence)
    return max(float(resampled.std()), implied)


def _floor_interval(before: Floats, after: Floats, confidence: float) -> _Interval:
    """The interval that no bootstrap may undercut."""
    n, difference = len(before), after - before
    alike = bool((difference == difference[0]).all())
    if _is_binary(before) and _is_binary(after) and difference.any():
        better, worse = _discordant(before, after)
        return _tango(better, worse, n, confidence)
    if n == 1 and difference.any():
        return _Interval(-1.0, 1.0)
    if alike:
        # So many items may differ from all that were seen, each by as much as there is room for.
        share, seen = 1 - (1 - confidence) ** (1 / n), float(difference[0])
        return _Interval(seen - share * (1 + seen), seen + share * (1 - seen))
    return _student(difference, np.ones(n), confidence)


def _floor_p(before: Floats, after: Floats, null: float) -> float:
    if _is_binary(before) and _is_binary(after):
        better, worse = _discordant(before, after)
        return float(stats.norm.cdf(_tango_statistic(better, worse, len(before), null)))
    if len(before) == 1:
        return 1.0
    return _student_p(after - before, np.ones(len(before)), null)


def _is_binary(scores: Floats) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _discordant(before: Floats, after: Floats) -> tuple[int, int]:
    return int((after > before).sum()), int((after < before).sum())


def _tango(better: int, worse: int, n: int, confidence: float) -> _Interval:
    """The differences that the score test does not reject in either direction."""
    z, mean = _z(confidence), (better - worse) / n
    edge = 1 - 1e-9

    def solve(target: float, away: float) -> float:
        def excess(null: float) -> float:
            return _tango_statistic(better, worse, n, null) - target

        if away * mean >= edge or excess(mean) * excess(away) >= 0:
            return math.copysign(1.0, away)
        # Bisection, since the statistic is infinite where the null leaves no variance.
        return float(optimize.bisect(excess, mean, away, xtol=1e-10))

    return _Interval(low=solve(z, -edge), high=solve(-z, edge))


def _tango_statistic(better: int, worse: int, n: int, null: float) -> float:
    """Standardised (better - worse)/n - null, with the variance at the null's best fit."""
    a = 2 * n
    b = -better - worse + (2 * n - better + worse) * null
    c = -worse * null * (1 - null)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * q + null * (1 - null))
    excess = better - worse - n * null
    if variance <= 0:
        return 0.0 if excess == 0 else math.copysign(math.inf, excess)
    return excess / math.sqrt(variance)


def _student(numerator: Floats, denominator: Floats, confidence: float) -> _Interval:
    """Bounds of sum(numerator) / sum(denominator) from two units or more."""
    n = len(numerator)
    ratio = float(numerator.sum() / denominator.sum())
    half = float(stats.t.ppf(confidence, n - 1)) * ratio_error(numerator, denominator)
    return _Interval(ratio - half, ratio + half)


def _student_p(numerator: Floats, denominator: Floats, null: float) -> float:
    n = len(numerator)
    excess = float(numerator.sum() / denominator.sum()) - null
    error = ratio_error(numerator, denominator)
    if error == 0:
        return 0.0 if excess < 0 else 1.0
    return float(stats.t.cdf(excess / error, n - 1))


def ratio_error(numerator: Floats, denominator: Floats) -> float:
    """Linearised standard error of sum(numerator) / sum(denominator), for two rows and more.

    The delta method: Cochran, Sampling Techniques, 1977, section 6.3.
    """
    n = len(numerator)
    residual = numerator - denominator * (numerator.sum() / denominator.sum())
    return float(math.sqrt(n / (n - 1) * (residual**2).sum()) / denominator.sum())


def _z(level: float) -> float:
    return float(stats.norm.ppf(level))


def _round_up(value: float) -> int:
    """Up to two significant digits: the third would be invented."""
    if value <= 10:
        return max(1, math.ceil(value))
    unit = 10 ** (math.floor(math.log10(value)) - 1)
    return int(math.ceil(value / unit - 1e-9) * unit)
