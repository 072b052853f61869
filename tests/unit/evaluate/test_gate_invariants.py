"""What must hold of the gate whatever the numbers are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.evaluate.items import Item, PerplexityRow
from posttrain.evaluate.pairing import Evaluation
from posttrain.evaluate.results import (
    EvaluationResults,
    Settings,
    TaskResult,
    Verdict,
    WinRate,
)
from posttrain.evaluate.statistics import PairedDifference, non_inferiority, paired_difference
from posttrain.evaluate.verdict import Candidate, Opponents, decide
from posttrain.evaluate.win_rate_check import check_win_rate
from posttrain.recipe.gate import GateConfig

CONFIG = GateConfig(bootstrap_samples=1000)
CONDITIONS = Settings(
    lm_eval="0",
    tasks=(),
    limit=None,
    seed=0,
    dtype="float32",
    questions_in_chat_template=False,
    chat_template=None,
    perplexity_rows=1,
    perplexity_max_length=1,
)

binary = st.tuples(st.booleans(), st.booleans()).map(lambda pair: tuple(map(float, pair)))
scored = st.tuples(*[st.sampled_from([0.0, 0.1, 0.25, 0.5, 2 / 3, 1.0])] * 2)
answers = st.one_of(
    st.lists(binary, min_size=1, max_size=40), st.lists(scored, min_size=1, max_size=40)
)
Answers = list[tuple[float, float]]


def compare(pairs: Answers, groups: Sequence[str] | None = None) -> PairedDifference:
    base, candidate = zip(*pairs, strict=True)
    return paired_difference(base, candidate, groups, max_drop=0.02, bootstrap_samples=1000)


def evaluation(label: str, tasks: dict[str, list[float]], groups: int = 1) -> Evaluation:
    items = [
        Item(name, f"{name}{number % groups}", number, str(number), "acc", value, {}, ())
        for name, values in tasks.items()
        for number, value in enumerate(values)
    ]
    results = [
        TaskResult(
            task=name,
            metric="acc",
            value=float(np.mean(values)),
            standard_error=None,
            n=len(values),
            higher_is_better=True,
            metrics={},
            groups={},
        )
        for name, values in tasks.items()
    ]
    rows: list[PerplexityRow] = []
    of = EvaluationResults(
        tasks=tuple(results),
        perplexity=None,
        settings=CONDITIONS,
        settings_digest=CONDITIONS.digest,
    )
    return Evaluation(label, of, items, rows)


def judge(tasks: dict[str, Answers], config: GateConfig = CONFIG, groups: int = 1) -> Verdict:
    base, new = (
        evaluation(label, {name: [pair[side] for pair in of] for name, of in tasks.items()}, groups)
        for side, label in enumerate(("base", "candidate"))
    )
    return decide(Opponents(base), Candidate(new), config)


@given(answers)
@settings(max_examples=60, deadline=None)
def test_swapping_the_two_models_mirrors_the_interval(pairs):
    there = compare(pairs)
    back = compare([(after, before) for before, after in pairs])
    assert back.mean == pytest.approx(-there.mean, abs=1e-12)
    # Resampling 1,000 times leaves noise of a few hundredths of the width.
    noise = 0.15 * (there.high - there.low)
    assert back.low == pytest.approx(-there.high, abs=noise)
    assert back.high == pytest.approx(-there.low, abs=noise)


@given(answers, st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_more_items_in_the_same_proportions_never_widen_the_interval(pairs, times):
    few, many = compare(pairs), compare(pairs * times)
    assert many.mean == pytest.approx(few.mean, abs=1e-12)
    assert many.high - many.low <= few.high - few.low + 1e-9
    assert many.standard_error <= few.standard_error + 1e-9


@given(answers, st.randoms(use_true_random=False), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_items_changes_nothing(pairs, random, groups):
    named = [(pair, str(number % groups)) for number, pair in enumerate(pairs)]
    mixed = random.sample(named, len(named))
    assert compare(*map(list, zip(*mixed, strict=True))) == compare(
        *map(list, zip(*named, strict=True))
    )


@given(st.lists(answers, min_size=2, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_further_benchmark_never_makes_passing_easier(several):
    tasks = {f"task{number}": pairs * 5 for number, pairs in enumerate(several)}
    if judge(tasks).verdict == "pass":
        tasks.popitem()
        assert judge(tasks).verdict == "pass"


@given(st.lists(answers, min_size=1, max_size=3), st.floats(0.001, 0.5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_pass_and_fail_exclude_each_other(several, max_drop, better):
    tasks = {f"task{number}": pairs for number, pairs in enumerate(several)}
    asked = {"max_drop": max_drop, "must_improve": tuple(tasks) if better else ()}
    verdict = judge(tasks, CONFIG.model_copy(update=asked))
    outcomes = {check.verdict for check in verdict.checks}
    for check in verdict.checks:
        assert check.low <= check.difference <= check.high
        assert not (check.verdict == "pass" and check.p_worse <= 0.05)
    assert (verdict.verdict == "pass") == (outcomes == {"pass"})
    assert (verdict.verdict == "fail") == ("fail" in outcomes)
    assert all(reason for reason in verdict.reasons)
    assert verdict.reasons


@given(answers, st.floats(0.001, 0.4), st.floats(0.001, 0.4))
@settings(max_examples=40, deadline=None)
def test_a_wider_bound_is_never_harder_to_keep(pairs, one, other):
    found = compare(pairs)
    if non_inferiority(found, min(one, other)) == "pass":
        assert non_inferiority(found, max(one, other)) == "pass"


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=10, max_size=60),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_a_win_rate_is_mirrored_when_the_two_answers_change_places(scores, random):
    there = check_win_rate(comparison(scores), 0.5, CONFIG)
    mirrored = [1 - score for score in random.sample(scores, len(scores))]
    back = check_win_rate(comparison(mirrored), 0.5, CONFIG)
    assert (there.low, there.high, back.low, back.high) != (None, None, None, None)
    width = there.high - there.low
    assert back.low == pytest.approx(1 - there.high, abs=0.15 * width)
    assert not (there.verdict == "pass" and back.verdict == "pass")
    assert 0 <= there.low <= there.win_rate <= there.high <= 1


def comparison(scores: list[float]) -> WinRate:
    return WinRate(
        candidate="sft",
        opponent="base",
        judge="people (2)",
        scores=tuple(scores),
        win_rate=float(np.mean(scores)),
        low=None,
        high=None,
        first_preferred=None,
        consistent=None,
        agreement=None,
    )
