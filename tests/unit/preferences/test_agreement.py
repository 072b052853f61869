"""Agreement beyond chance, against values worked out by hand and published ones."""

from __future__ import annotations

import random

import pytest

from posttrain.preferences.agreement import (
    cohen_kappa,
    krippendorff_alpha,
    pair_agreement,
    position_bias,
    share,
)


def from_table(both_yes: int, only_first: int, only_second: int, neither: int) -> list[list[str]]:
    first = ["yes"] * (both_yes + only_first) + ["no"] * (only_second + neither)
    second = ["yes"] * both_yes + ["no"] * only_first + ["yes"] * only_second + ["no"] * neither
    return [first, second]


def test_kappa_is_what_a_hand_computes() -> None:
    # p_o = 35/50 = 0.7; p_e = (25 * 30 + 25 * 20) / 2500 = 0.5; (0.7 - 0.5) / (1 - 0.5) = 0.4
    kappa = cohen_kappa(*from_table(20, 5, 10, 15))
    assert kappa is not None
    assert kappa.value == pytest.approx(0.4)
    # Wilson's interval of 35 in 50 is 0.5625 to 0.8090, and (p - 0.5) / 0.5 of both ends:
    assert (kappa.low, kappa.high) == pytest.approx((0.125, 0.618), abs=1e-3)


def test_kappa_with_three_categories_is_what_a_hand_computes() -> None:
    first = ["first", "first", "second", "tie", "second", "first"]
    second = ["first", "second", "second", "tie", "second", "tie"]
    # p_o = 4/6; p_e = (3*1 + 2*3 + 1*2) / 36 = 11/36; (24 - 11) / (36 - 11) = 13/25
    kappa = cohen_kappa(first, second)
    assert kappa is not None
    assert kappa.value == pytest.approx(13 / 25)


def test_kappa_is_one_for_equal_and_below_zero_for_opposite_raters() -> None:
    same = cohen_kappa(["a", "b", "a", "b"], ["a", "b", "a", "b"])
    opposite = cohen_kappa(["a", "b", "a", "b"], ["b", "a", "b", "a"])
    assert same is not None
    assert opposite is not None
    assert (same.value, opposite.value) == (1.0, -1.0)
    assert same.low < 0.1, "four items are no proof of agreement"


def test_kappa_is_unknown_where_chance_agrees_always_and_without_items() -> None:
    assert cohen_kappa(["a", "a", "a"], ["a", "a", "a"]) is None
    assert cohen_kappa([], []) is None
    with pytest.raises(ValueError, match="shorter"):
        cohen_kappa(["a", "b"], ["a"])


def test_kappa_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    draw = random.Random(0)
    for _ in range(30):
        first = draw.choices(("first", "second", "tie"), (5, 3, 1), k=40)
        second = [vote if draw.random() < 0.6 else draw.choice(first) for vote in first]
        kappa = cohen_kappa(first, second)
        assert kappa is not None
        assert kappa.value == pytest.approx(metrics.cohen_kappa_score(first, second))
        assert kappa.low < kappa.value < kappa.high


def test_alpha_is_that_of_the_published_example() -> None:
    # Krippendorff (2011), section C: four observers, twelve units, some missing.
    lines = {
        "A": "1 2 3 3 2 1 4 1 2 . . .",
        "B": "1 2 3 3 2 2 4 1 2 5 . 3",
        "C": ". 3 3 3 2 3 4 2 2 5 1 .",
        "D": "1 2 3 3 2 4 4 1 2 5 1 .",
    }
    votes = {
        rater: {str(unit): value for unit, value in enumerate(line.split()) if value != "."}
        for rater, line in lines.items()
    }
    assert krippendorff_alpha(votes) == pytest.approx(0.743, abs=5e-4)


def test_alpha_is_what_a_hand_computes() -> None:
    # Units: aa, ab, bb, ab. n = 8, four votes each: 1 - 7 * (2 + 2) / (64 - 32) = 0.125
    one = dict(zip("wxyz", "aaba", strict=True))
    other = dict(zip("wxyz", "abbb", strict=True))
    assert krippendorff_alpha({"one": one, "other": other}) == pytest.approx(0.125)


def test_alpha_is_unknown_without_two_votes_on_an_item_or_with_one_category() -> None:
    assert krippendorff_alpha({"one": {"x": "a"}, "other": {"y": "b"}}) is None
    assert krippendorff_alpha({"one": {"x": "a"}, "other": {"x": "a"}}) is None
    assert krippendorff_alpha({}) is None


def test_raters_are_compared_on_the_items_that_both_rated() -> None:
    votes = {
        "ann": {"1": "first", "2": "second", "3": "tie"},
        "ben": {"2": "second", "3": "first", "9": "first"},
        "eve": {"7": "first"},
    }
    [pair] = pair_agreement(votes)
    assert pair.raters == ("ann", "ben")
    assert (pair.agreed.count, pair.agreed.of) == (1, 2)


def test_a_share_has_wilsons_interval() -> None:
    found = share(8, 10)
    assert found is not None
    # Worked out by hand from (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96.
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert share(0, 0) is None


def test_a_preference_for_a_place_is_seen_once_chance_is_no_explanation() -> None:
    few = position_bias(["A", "A", "A", "tie", "skip"])
    assert few is not None
    assert (few.count, few.of) == (3, 3)
    many = position_bias(["A"] * 30 + ["B"] * 10)
    balanced = position_bias(["A"] * 21 + ["B"] * 19)
    assert many is not None
    assert many.excludes_half
    assert balanced is not None
    assert not balanced.excludes_half
    assert position_bias(["tie", "skip"]) is None
