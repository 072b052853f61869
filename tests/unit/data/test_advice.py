from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.advice import DatasetFacts, Diversity, opening, sufficiency, tokens_of
from posttrain.data.rows import Chat, Document, Message


def facts(**changes: Any) -> DatasetFacts:
    """A dataset that nothing is wrong with."""
    good: dict[str, Any] = {
        "family": "chats",
        "rows": 20_000,
        "words": 2_000_000,
        "validation_rows": 2_000,
        "near_duplicates": 0.01,
        "methods": ("sft-full",),
    }
    return DatasetFacts(**(good | changes))


def texts(level: str, **changes: Any) -> list[str]:
    return [advice.text for advice in sufficiency(facts(**changes)) if advice.level == level]


def test_a_dataset_that_nothing_is_wrong_with_gets_praise_alone() -> None:
    assert [advice.level for advice in sufficiency(facts())] == ["good"]


@pytest.mark.parametrize(
    ("family", "method", "minimum", "usual"),
    [
        ("chats", "sft-lora", 500, 2_000),
        ("chats", "sft-full", 1_000, 10_000),
        ("preferences", "reward", 5_000, 20_000),
        ("preferences", "dpo", 3_000, 10_000),
        ("kto", "kto", 6_000, 20_000),
    ],
)
def test_rows_are_held_against_what_the_method_needs(
    family: str, method: str, minimum: int, usual: int
) -> None:
    def level(rows: int) -> str:
        return sufficiency(facts(family=family, methods=(method,), rows=rows))[0].level

    assert [level(minimum - 1), level(minimum), level(usual - 1), level(usual)] == [
        "warning",
        "note",
        "note",
        "good",
    ]


def test_a_warning_says_how_many_there_are_and_how_many_are_wanted() -> None:
    (text,) = texts("warning", rows=417, words=3_000, methods=("sft-lora",))

    assert text.startswith("417 training examples (about 4,000 tokens")
    assert "500 are the usual minimum, 2,000 to 10,000" in text


def test_without_a_method_rows_that_are_enough_for_lora_are_no_warning() -> None:
    assert texts("warning", rows=700, methods=()) == []
    assert len(texts("note", rows=700, methods=())) == 2
    assert len(texts("warning", rows=100, methods=())) == 2


def test_more_examples_than_lora_gains_from_are_worth_a_note() -> None:
    (text,) = texts("note", rows=60_000, methods=("sft-lora",))

    assert "full fine-tuning" in text


def test_a_corpus_is_measured_in_tokens() -> None:
    (text,) = texts("warning", family="documents", methods=(), words=150_000)

    assert "200,000 tokens" in text
    assert texts("warning", family="documents", methods=(), words=300_000_000) == []


def test_four_tokens_are_three_words() -> None:
    assert tokens_of(300) == 400


def test_no_rows_at_all_are_one_warning() -> None:
    assert [advice.level for advice in sufficiency(facts(rows=0))] == ["warning"]


@pytest.mark.parametrize(("rows", "points"), [(25, 20), (50, 14), (96, 10)])
def test_a_small_validation_set_is_told_its_margin_of_error(rows: int, points: int) -> None:
    (text,) = texts("warning", validation_rows=rows)

    assert f"{points} percentage points" in text


def test_a_missing_validation_set_is_a_warning_and_a_hundred_rows_are_enough() -> None:
    assert len(texts("warning", validation_rows=0)) == 1
    assert texts("warning", validation_rows=100) == []


def test_duplicates_matter_from_a_tenth_of_the_rows_on() -> None:
    assert texts("note", exact_duplicates=0.05, near_duplicates=0.04) == []
    assert "12% of the rows" in texts("note", exact_duplicates=0.08, near_duplicates=0.04)[0]
    assert "60% of the rows" in texts("warning", exact_duplicates=0.3, near_duplicates=0.3)[0]


def test_near_duplicates_that_nobody_looked_for_are_pointed_out() -> None:
    assert "near_dedup" in texts("note", near_duplicates=None)[0]


def test_a_template_in_a_third_of_the_prompts_is_quoted() -> None:
    varied = {f"question {number}": 1 for number in range(100)}
    diversity = Diversity.of(varied | {"classify the sentiment": 60})

    assert '38% of the prompts begin with "classify' in texts("warning", diversity=diversity)[0]
    assert texts("warning", diversity=Diversity.of(varied)) == []


def test_few_ways_to_begin_are_a_warning_though_none_is_in_the_majority() -> None:
    diversity = Diversity.of(dict.fromkeys("abcde", 100))

    assert "5 effective openings" in texts("warning", diversity=diversity)[0]


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 1_000), min_size=1, max_size=30))
def test_effective_openings_lie_between_one_and_the_different_ones(counts: dict[str, int]) -> None:
    diversity = Diversity.of(counts)

    assert diversity is not None
    assert 1 - 1e-9 <= diversity.effective <= diversity.distinct + 1e-6
    assert 1 / diversity.distinct <= diversity.share <= 1


@given(st.integers(1, 500), st.integers(1, 50))
def test_equally_frequent_openings_all_count(distinct: int, each: int) -> None:
    diversity = Diversity.of(dict.fromkeys(map(str, range(distinct)), each))

    assert diversity is not None
    assert math.isclose(diversity.effective, distinct)


def test_diversity_of_nothing_is_not_measured() -> None:
    assert Diversity.of(Counter()) is None


def test_a_row_opens_with_its_first_question_not_with_the_system_prompt() -> None:
    turns = (
        Message("system", "You are kind."),
        Message("user", "Write  a\nPOEM about rain."),
        Message("assistant", "No."),
    )

    assert opening(Chat(id="0", file="f", row=1, messages=turns)) == "write a poem"
    assert opening(Document(id="0", file="f", row=1, text="Once upon a time")) == "once upon a"


@pytest.mark.parametrize(("share", "side"), [(0.8, "longer"), (0.2, "shorter")])
def test_pairs_that_length_alone_decides_are_a_warning(share: float, side: str) -> None:
    (text,) = texts(
        "warning",
        family="preferences",
        methods=("reward",),
        chosen_longer=share,
        chosen_words=300.0,
        rejected_words=200.0,
    )

    assert f"80% have the {side} answer" in text
    assert "1.50 times" in text


def test_pairs_of_mixed_lengths_are_fine() -> None:
    assert texts("warning", family="preferences", methods=("dpo",), chosen_longer=0.6) == []


@pytest.mark.parametrize(("wanted", "fine"), [(99, False), (100, True), (133, True), (134, False)])
def test_kto_wants_between_one_and_four_thirds_wanted_rows(wanted: int, fine: bool) -> None:
    found = texts("warning", family="kto", methods=("kto",), wanted=wanted, unwanted=100)

    assert (found == []) is fine


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_the_weights_that_are_advised_put_kto_right(wanted: int, unwanted: int) -> None:
    def advised(**weights: float) -> list[str]:
        return texts(
            "warning", family="kto", methods=("kto",), wanted=wanted, unwanted=unwanted, **weights
        )

    for text in advised():
        found = re.search(r"Set `(\w+)` between (\S+) and (\S+)\.$", text)
        assert found
        low, high = float(found[2]), float(found[3])
        assert low < high
        assert advised(**{found[1]: low}) == advised(**{found[1]: high}) == []


def test_kto_without_unwanted_rows_is_told_so() -> None:
    (text,) = texts("warning", family="kto", methods=("kto",), wanted=9_000, unwanted=0)

    assert "No unwanted rows" in text


def test_a_label_ten_times_as_frequent_as_another_is_a_warning() -> None:
    (text,) = texts("warning", labels={"refund": 1_100, "praise": 100, "spam": 500})

    assert '"refund" has 1,100 rows, "praise" has 100: 11 times' in text
    assert texts("warning", labels={"refund": 1_000, "praise": 100}) == []
    assert texts("warning", labels={"refund": 1_000}) == []


def test_warnings_come_first() -> None:
    levels = [
        advice.level
        for advice in sufficiency(facts(near_duplicates=None, labels={"a": 100, "b": 1}))
    ]

    assert levels == ["warning", "note", "good"]
