"""Who rates what, and that the blinding can be undone."""

from __future__ import annotations

import random
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from posttrain.preferences.blinding import Order, Vote, assign, blind, draw_orders, unblind
from posttrain.preferences.blinding import shown_as as shown

ORDERS = st.sampled_from(get_args(Order))


@given(st.sampled_from(get_args(Vote)), ORDERS)
def test_unblinding_undoes_blinding(vote: Vote, order: Order) -> None:
    assert unblind(blind(vote, order), order) == vote


@given(st.text(), st.text(), ORDERS, st.sampled_from(("A", "B")))
def test_the_vote_is_for_the_answer_that_the_rater_chose(
    first: str, second: str, order: Order, choice: str
) -> None:
    at = dict(zip("AB", shown((first, second), order), strict=True))
    vote = unblind(choice, order)  # type: ignore[arg-type]
    assert {"first": first, "second": second}[str(vote)] == at[choice]


def test_a_skip_is_no_vote() -> None:
    assert unblind("skip", "AB") is None


@given(st.integers(1, 60), st.integers(1, 6), st.floats(0, 1), st.integers(0, 10_000))
def test_every_item_is_rated_and_the_shared_ones_by_all(
    count: int, raters: int, overlap: float, seed: int
) -> None:
    items = [f"i{number}" for number in range(count)]
    names = [f"r{number}" for number in range(raters)]
    proposed = {item: ("first", "second", None)[len(item) % 3] for item in items}
    sheets = assign(proposed, names, overlap, seed)
    loads = [len(given) for given in sheets.values()]
    times = [sum(item in given for given in sheets.values()) for item in items]
    assert list(sheets) == names
    assert min(times) >= 1
    assert max(loads) - min(loads) <= 1
    if raters > 1:
        assert set(times) <= {1, raters}
        assert times.count(raters) == round(overlap * count)
    assert sheets == assign(proposed, names, overlap, seed)


@given(st.integers(0, 80), st.integers(0, 10_000))
def test_either_answer_stands_at_a_equally_often(count: int, seed: int) -> None:
    orders = draw_orders(count, random.Random(seed))
    assert abs(orders.count("AB") - orders.count("BA")) <= 1


def test_raters_see_shared_items_in_other_places_and_turned_otherwise() -> None:
    items = {f"i{number}": ("first", "second")[number % 3 > 0] for number in range(40)}
    one, other = assign(items, ["one", "other"], 1.0, seed=3).values()
    assert set(one) == set(other)
    assert list(one) != list(other)
    assert 5 < sum(one[item] == other[item] for item in items) < 35
    assert assign(items, ["one", "other"], 1.0, seed=4)["one"] != one


@given(st.integers(0, 10_000))
def test_what_was_proposed_stands_at_a_as_often_as_at_b(seed: int) -> None:
    items = {f"i{number}": ("first", "second")[number % 3 > 0] for number in range(36)}
    for orders in assign(items, ["one", "other", "third"], 0.4, seed).values():
        at_a = sum(blind(items[item], order) == "A" for item, order in orders.items())  # type: ignore[arg-type]
        assert abs(2 * at_a - len(orders)) <= 2
