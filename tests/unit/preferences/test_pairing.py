"""Pairs from scores, and the count of what made none."""

from __future__ import annotations

import pytest

from posttrain.preferences.answers import AnswerSet, SampledAnswer
from posttrain.preferences.key import Turn
from posttrain.preferences.pairing import Choose, PairSettings, make_pairs, remarks


def answers(*texts: str, index: int = 0, ended: bool = True) -> AnswerSet:
    """A token a character."""
    return AnswerSet(
        index=index,
        prompt=(Turn(role="user", content="?"),),
        answers=tuple(SampledAnswer(text=t, tokens=len(t), ended=ended) for t in texts),
        source=f"prompts.txt:{index + 1}",
        model="m@0",
        sampling="s",
    )


SCORES = {"best": 3.0, "good": 2.0, "fair": 2.0, "bad": -1.0}


@pytest.mark.parametrize(
    ("choose", "wanted"),
    [
        ("best-worst", [("best", "bad")]),
        ("adjacent", [("best", "good"), ("fair", "bad")]),
        (
            "all",
            [("best", "good"), ("best", "fair"), ("best", "bad"), ("good", "bad"), ("fair", "bad")],
        ),
    ],
)
def test_pairs_are_made_by_rank_and_equal_scores_make_none(
    choose: Choose, wanted: list[tuple[str, str]]
) -> None:
    pairs, report = make_pairs(
        [answers("good", "bad", "best", "fair")], [SCORES], PairSettings(choose=choose)
    )
    assert [(pair.chosen.text, pair.rejected.text) for pair in pairs] == wanted
    assert all(pair.margin == pair.scores[0] - pair.scores[1] > 0 for pair in pairs)
    assert report.counts.pairs_tied == (0 if choose == "best-worst" else 1)
    ranks = {pair.chosen.text: pair.ranks[0] for pair in pairs}
    ranks |= {pair.rejected.text: pair.ranks[1] for pair in pairs}
    expected = {"best": 1, "good": 2, "fair": 2, "bad": 4}
    assert ranks == {text: expected[text] for text in ranks}


def test_a_pair_needs_the_least_margin() -> None:
    settings = PairSettings(choose="all", min_margin=3.0)
    pairs, report = make_pairs([answers("best", "good", "bad")], [SCORES], settings)
    assert [pair.margin for pair in pairs] == [4.0, 3.0]
    assert report.counts.pairs_close == 1


def test_equal_and_blank_answers_make_no_pair_and_all_is_counted() -> None:
    sets = [
        answers("good", "good", "", "bad", ended=False),
        answers("bad", "bad", "bad", index=1),
        answers("", "", index=2),
    ]
    scores = [{"good": 2.0, "bad": -1.0}, {"bad": -1.0}, {}]
    pairs, report = make_pairs(sets, scores, PairSettings(), too_long=5)
    assert [(pair.chosen.text, pair.rejected.text) for pair in pairs] == [("good", "bad")]
    counts = report.counts
    assert (counts.prompts, counts.prompts_too_long, counts.prompts_one_answer) == (3, 5, 2)
    assert (counts.answers, counts.answers_blank, counts.answers_repeated) == (9, 3, 3)
    assert (counts.answers_cut, counts.pairs) == (4, 1)


def test_no_pair_is_said_and_not_divided_by() -> None:
    pairs, report = make_pairs([answers("a", "a")], [{"a": 1.0}], PairSettings())
    assert pairs == []
    assert (report.margins, report.mean_chosen, report.lengths) == ({}, None, None)
    assert "there is no pair" in remarks(report)[0]


def many(sign: int, count: int = 20) -> list[str]:
    sets = [answers("a" * (n + 1), "b" * (2 * n + 5), index=n) for n in range(count)]
    scores = [{a.text: sign * a.tokens for a in one.answers} for one in sets]
    return remarks(make_pairs(sets, scores, PairSettings())[1])


def test_a_reward_of_length_alone_is_warned_of() -> None:
    assert many(+1)[0].startswith("the longer answer wins in 20 of 20 pairs")
    assert many(-1)[0].startswith("the shorter answer wins in 20 of 20 pairs")
    assert many(+1, count=5) == [], "five pairs are no evidence"


def test_a_fair_reward_is_not_warned_of() -> None:
    sets = [answers("a" * 3, "b" * 6, index=n) for n in range(20)]
    scores = [{"aaa": n % 2, "bbbbbb": 1 - n % 2} for n in range(20)]
    pairs, report = make_pairs(sets, scores, PairSettings())
    assert remarks(report) == []
    assert report.lengths is not None
    assert (report.lengths.chosen, report.lengths.rejected) == (4.5, 4.5)
    assert report.margins == {"min": 1, "25%": 1, "50%": 1, "75%": 1, "max": 1}
    assert len(pairs) == 20
