from __future__ import annotations

import numpy as np
import pytest

from posttrain.evaluate.answers import describe, distinct, distinct_fall_p, measure


def test_repetition_is_the_share_of_three_words_that_stood_there_before():
    # a b c, b c a, c a b, a b c: three of four are new.
    texts = ["a b c a b c", "one two three four", "no no", "", "x x x x x x"]
    assert measure(texts).repetition == pytest.approx([1 / 4, 0, 0, 0, 3 / 4])


def test_the_longest_run_counts_one_word_in_a_row():
    texts = ["very VERY very good", "a b a b", "", "one", "b a a b b b"]
    assert list(measure(texts).longest_run) == [3, 1, 0, 1, 3]


def test_a_mark_is_a_word_so_that_nothing_but_commas_is_repetition():
    commas = measure([", , ,,, ,", "one, two, three"])
    assert list(commas.longest_run) == [6, 1]
    assert commas.repetition == pytest.approx([3 / 4, 0])
    # Words and marks: x , , , x. Bigrams: x, ,, ,, ,x.
    assert distinct(["x,,, x"], 2) == pytest.approx(3 / 4)


def test_characters_are_the_words_of_scripts_without_spaces():
    assert measure(["好好好"]).longest_run[0] == 3


def test_distinct_counts_n_grams_over_all_answers_and_not_across_them():
    # Words: a b a b a c. Bigrams: ab, ba, ab, ac.
    assert distinct(["a b a b", "a c"], 1) == pytest.approx(3 / 6)
    assert distinct(["a b a b", "a c"], 2) == pytest.approx(3 / 4)
    assert distinct(["", "one"], 2) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, I can\u2019t do that.",
        "As an AI language model I have no opinion.",
        "Unfortunately, I am unable to open files.",
        "I will not provide this.",
    ],
)
def test_refusals_are_known_by_how_they_begin(text):
    assert measure([text]).refusals[0]


@pytest.mark.parametrize(
    "text",
    [
        "I can't help but admire the question. It is 4.",
        "The answer is 4.",
        "A plain answer. " * 20 + "I am unable to say more.",
        "",
    ],
)
def test_other_answers_are_no_refusals(text):
    assert not measure([text]).refusals[0]


def test_hedges_are_found_anywhere_and_as_whole_words():
    texts = [
        "It is 4. Perhaps 5.",
        "I think so",
        "It depends on the file",
        "The maybes of May",
        "Yes",
    ]
    assert list(measure(texts).hedges) == [True, True, True, False, False]


def test_a_description_holds_means_over_the_answers():
    described = describe(["I think a b", "a b c a b c"])
    assert described["hedges"] == 0.5
    assert described["refusals"] == 0.0
    assert described["repetition"] == pytest.approx(1 / 8)
    assert described["distinct_1"] == pytest.approx(5 / 10)
    assert set(described) == {"repetition", "distinct_1", "distinct_2", "refusals", "hedges"}


def sentences(count: int, vocabulary: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        " ".join(f"w{word}" for word in rng.integers(vocabulary, size=20)) for _ in range(count)
    ]


def test_a_fall_of_distinct_n_is_shown_and_a_rise_is_not():
    rich, poor = sentences(40, 60, 0), sentences(40, 12, 1)
    assert distinct_fall_p(rich, poor, 2, 199, 0) == pytest.approx(1 / 200)
    assert distinct_fall_p(poor, rich, 2, 199, 0) == 1.0
    assert distinct_fall_p(rich, rich, 2, 199, 0) == 1.0
    assert distinct_fall_p(["", ""], ["", ""], 2, 199, 0) == 1.0


def test_equal_kinds_of_answers_seldom_show_a_fall_of_distinct_n():
    found = [
        distinct_fall_p(sentences(30, 40, 2 * n), sentences(30, 40, 2 * n + 1), 2, 199, n) < 0.05
        for n in range(200)
    ]
    # 0.05, and twice the standard error of 200 draws.
    assert 0 < sum(found) <= 200 * (0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5)
