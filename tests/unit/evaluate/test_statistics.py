from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from posttrain.evaluate import statistics
from posttrain.evaluate.statistics import (
    PairedDifference,
    holm,
    items_needed,
    mcnemar_exact,
    non_inferiority,
    paired_difference,
    paired_nats,
    smallest_detectable_drop,
)

MARGIN = 0.02
answers = st.lists(
    st.tuples(st.booleans(), st.booleans()).map(lambda pair: (float(pair[0]), float(pair[1]))),
    min_size=1,
    max_size=60,
)


def compare(base: object, candidate: object, **options: object) -> PairedDifference:
    return paired_difference(base, candidate, **{"bootstrap_samples": 1000, **options})  # type: ignore[arg-type]


@given(answers)
@settings(max_examples=40, deadline=None)
def test_bounds_enclose_the_mean_and_are_never_equal(pairs):
    base, candidate = zip(*pairs, strict=True)
    difference = compare(base, candidate)
    assert -1 <= difference.low <= difference.mean <= difference.high <= 1
    assert difference.low < difference.high
    assert compare(candidate, base).mean == -difference.mean


@given(answers, st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_same_seed_gives_the_same_numbers(pairs, seed):
    base, candidate = zip(*pairs, strict=True)
    assert compare(base, candidate, seed=seed) == compare(base, candidate, seed=seed)


@pytest.mark.parametrize(("n", "decision"), [(5, "open"), (100, "open"), (149, "pass")])
def test_identical_answers_prove_no_more_than_their_number(n, decision):
    same = [1.0, 0.0] * n
    difference = compare(same[:n], same[:n])
    # Clopper-Pearson: the share p at which n items in a row without a change have a 5% chance.
    assert (1 - difference.high) ** n == pytest.approx(0.05)
    assert difference.low == -difference.high
    expected = "not enough evidence" if decision == "open" else "pass"
    assert non_inferiority(difference, MARGIN) == expected


def test_one_lucky_item_in_five_proves_nothing():
    difference = compare([0, 1, 1, 0, 1], [1, 1, 1, 0, 1], bootstrap_samples=10_000)
    assert difference.mean == pytest.approx(0.2)
    assert difference.low < -0.1
    assert non_inferiority(difference, MARGIN) == "not enough evidence"


def test_a_single_item_gives_the_widest_interval_for_any_kind_of_score():
    assert compare([0.3], [0.4]).low == -1.0
    assert compare([1.0], [0.0]).low <= -0.9


@pytest.mark.parametrize(
    ("better", "worse", "n"), [(0, 1, 44), (5, 2, 30), (2, 0, 4), (3, 3, 80), (1, 9, 50)]
)
def test_bounds_are_where_the_likelihood_puts_them(better, worse, n):
    """At each bound the score test, with its variance found by brute force, gives exactly 5%."""
    base = [0.0] * better + [1.0] * worse + [1.0] * (n - better - worse)
    candidate = [1.0] * better + [0.0] * worse + [1.0] * (n - better - worse)
    # So few resamples that the bootstrap does not decide.
    difference = compare(base, candidate, bootstrap_samples=2)
    for bound, z in ((difference.low, 1.644854), (difference.high, -1.644854)):
        share = most_likely_share(better, worse, n, bound)
        deviation = (n * (2 * share + bound * (1 - bound))) ** 0.5
        assert (better - worse - n * bound) / deviation == pytest.approx(z, abs=1e-3)


def most_likely_share(better: int, worse: int, n: int, null: float) -> float:
    """Share of worsened items that fits best when improved minus worsened is `null`."""
    share = np.linspace(max(0.0, -null), (1 - null) / 2, 2_000_001)[1:-1]
    fit = better * np.log(share + null) + worse * np.log(share)
    fit += (n - better - worse) * np.log(1 - 2 * share - null)
    return float(share[fit.argmax()])


@pytest.mark.parametrize("n", [100, 200, 400])
def test_error_rates(n):
    """True drop 0 hardly ever fails; a drop of twice the margin hardly ever passes."""
    rates = {}
    for drop in (0.0, MARGIN, 2 * MARGIN):
        decisions = Counter(
            non_inferiority(simulated(n, drop, seed), MARGIN) for seed in range(300)
        )
        rates[drop] = {key: count / 300 for key, count in decisions.items()}
    assert rates[0.0].get("fail", 0) < 0.05
    assert rates[2 * MARGIN].get("pass", 0) < 0.05
    # At the margin itself either decision is wrong one time in twenty (plus simulation noise).
    assert rates[MARGIN].get("pass", 0) < 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5
    assert rates[MARGIN].get("fail", 0) < 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def simulated(n: int, drop: float, seed: int, disagreement: float = 0.1) -> PairedDifference:
    rng = np.random.default_rng([n, round(drop * 1000), seed])
    base = rng.integers(0, 2, n).astype(float)
    draw = rng.random(n)
    worse, better = (disagreement + drop) / 2, (disagreement - drop) / 2
    base = np.where(draw < worse, 1.0, np.where(draw < worse + better, 0.0, base))
    candidate = np.where(draw < worse + better, 1.0 - base, base)
    return compare(base, candidate, max_drop=MARGIN, seed=seed)


def test_with_many_items_the_interval_is_the_textbook_one():
    rng = np.random.default_rng(0)
    base, candidate = rng.random(3000), rng.random(3000) + 0.1
    difference = compare(base, candidate)
    expected = stats.t.interval(
        0.9, 2999, loc=np.mean(candidate - base), scale=stats.sem(candidate - base)
    )
    assert (difference.low, difference.high) == pytest.approx(expected, abs=1e-3)


def test_subjects_that_move_together_widen_the_interval():
    rng = np.random.default_rng(0)
    moved = np.repeat(rng.choice([0.0, 1.0], 40), 25)
    groups = [str(index // 25) for index in range(1000)]
    alone = compare(np.zeros(1000), moved)
    together = compare(np.zeros(1000), moved, groups=groups)
    assert together.mean == alone.mean
    assert together.high - together.low > 3 * (alone.high - alone.low)


def test_a_single_group_is_no_cluster():
    base, candidate = [0.0, 1.0, 1.0, 0.0] * 10, [1.0, 1.0, 0.0, 0.0] * 10
    assert compare(base, candidate, groups=["a"] * 40) == compare(base, candidate)


@pytest.mark.parametrize(("base", "candidate"), [([], []), ([1.0], [1.0, 0.0])])
def test_scores_that_do_not_pair_are_refused(base, candidate):
    with pytest.raises(ValueError, match="paired scores"):
        compare(base, candidate)


def test_mcnemar_is_the_binomial_test_on_disagreements():
    base = [1.0] * 8 + [0.0] * 2 + [1.0] * 50
    candidate = [0.0] * 8 + [1.0] * 2 + [1.0] * 50
    assert mcnemar_exact(base, candidate) == pytest.approx(112 / 1024)
    assert mcnemar_exact(base, base) == 1.0


def test_p_value_and_upper_bound_tell_the_same_story():
    for seed in range(30):
        difference = simulated(400, 0.05, seed)
        shown = difference.high < -MARGIN
        # At the very edge the bootstrap's quantile and its tail count round differently.
        assert shown == (difference.p_worse < 0.05) or abs(difference.p_worse - 0.05) < 0.005


@pytest.mark.parametrize(
    ("base", "candidate"),
    [([1.0] * 100, [1.0] * 99 + [0.0]), ([1.0] * 20, [1.0] * 20), ([0.0] * 30, [1.0] + [0.0] * 29)],
)
def test_items_needed_asks_for_more_than_there_were(base, candidate):
    difference = compare(base, candidate)
    assert non_inferiority(difference, MARGIN) == "not enough evidence"
    needed = items_needed(difference, MARGIN, 0.95)
    assert needed is not None
    assert needed > len(base)


def test_items_needed_keeps_its_promise():
    # A tenth of the items changes, no true drop: with the items it asks for, most runs pass.
    needed = items_needed(PairedDifference(0, -0.04, 0.04, 200, 0.1**0.5 / 200**0.5, 1), 0.02, 0.95)
    assert needed == 1600
    passed = sum(
        non_inferiority(simulated(needed, 0.0, seed), MARGIN) == "pass" for seed in range(60)
    )
    assert 0.65 <= passed / 60 <= 0.95


def test_items_needed_does_not_count_on_a_lucky_gain():
    lucky = PairedDifference(0.05, -0.03, 0.13, 100, 0.05, 1)
    none = PairedDifference(0.0, -0.08, 0.08, 100, 0.05, 1)
    assert items_needed(lucky, 0.02, 0.95) == items_needed(none, 0.02, 0.95)


def test_items_needed_admits_what_is_out_of_reach():
    at_the_margin = PairedDifference(-0.02, -0.04, 0.0, 200, 0.01, 0.5)
    assert items_needed(at_the_margin, 0.02, 0.95) is None
    nearly = PairedDifference(-0.01999, -0.04, 0.0, 200, 0.01, 0.5)
    assert items_needed(nearly, 0.02, 0.95) is None


def test_smallest_detectable_drop_is_found_with_the_stated_power():
    drop = smallest_detectable_drop(0.02, 0.95, power=0.8)
    assert stats.norm.sf(stats.norm.ppf(0.95), loc=drop / 0.02) == pytest.approx(0.8)


def test_holm_is_stricter_than_each_test_alone_and_milder_than_bonferroni():
    assert holm([0.04, 0.04], 0.05) == [False, False]
    assert holm([0.04, 0.01], 0.05) == [True, True]
    assert holm([0.03, 0.01, 0.5], 0.05) == [False, True, False]
    assert holm([], 0.05) == []


def test_nats_are_weighted_by_tokens():
    difference = paired_nats([10.0, 300.0], [10.0, 200.0], [10, 100])
    assert difference.mean == pytest.approx(100 / 110)


def test_nats_of_a_better_model_are_shown_better():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, 80)
    base = tokens * rng.normal(3.0, 0.3, 80)
    better = paired_nats(base, base - tokens * rng.normal(0.2, 0.3, 80), tokens)
    assert 0 < better.low < better.mean < better.high
    worse = paired_nats(base, base + tokens * rng.normal(0.2, 0.3, 80), tokens, max_rise=0.01)
    assert worse.high < -0.01
    assert worse.p_worse < 0.001


def test_nats_bounds_cover_their_truth():
    """Nine in ten two-sided intervals hold the true ratio, with as few as 15 rows."""
    covered = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(5, 60, 15)
        saved = tokens * 0.1 + rng.normal(0, 3, 15)
        difference = paired_nats(saved, np.zeros(15), tokens, bootstrap_samples=1000)
        covered += difference.low <= 0.1 <= difference.high
    assert covered / 300 > 0.87


@pytest.mark.parametrize("tokens", [[1.0, 0.0], [1.0]])
def test_rows_without_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match="scored tokens"):
        paired_nats([1.0, 2.0], [1.0, 2.0], tokens)


def test_one_row_is_refused():
    with pytest.raises(ValueError, match="two or more"):
        paired_nats([1.0], [2.0], [3])


def test_a_clean_sweep_is_evidence() -> None:
    # Tango's interval ends at Wilson's where all items go one way: z^2 / (n + z^2) is left open.
    won = statistics.paired_difference([0.0] * 60, [1.0] * 60, bootstrap_samples=1000)
    lost = statistics.paired_difference([1.0] * 60, [0.0] * 60, bootstrap_samples=1000)
    assert (won.low, won.high) == (pytest.approx(2 * 0.9568 - 1, abs=1e-3), 1.0)
    assert (lost.low, lost.high) == (-1.0, pytest.approx(1 - 2 * 0.9568, abs=1e-3))


def test_scores_that_all_differ_alike_may_still_be_luck() -> None:
    found = statistics.paired_difference([0.25] * 20, [0.75] * 20, bootstrap_samples=1000)
    # With 95% confidence at most 13.9% of the items do otherwise; at worst they lose all.
    assert found.low == pytest.approx(0.5 - 0.1391 * 1.5, abs=1e-4)
    assert found.high == pytest.approx(0.5 + 0.1391 * 0.5, abs=1e-4)
