"""A gate that looks at the present champion as well, and at what a judge preferred."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from posttrain.errors import DataError
from posttrain.evaluate.results import Verdict, WinRate
from posttrain.evaluate.win_rate_check import check_win_rate
from posttrain.recipe.gate import GateConfig
from posttrain.stages.gate import main
from posttrain.stages.program import StageResult
from tests.unit.evaluate.test_gate import (
    BASE,
    BETTER,
    LESS,
    MORE,
    NATS,
    WORSE,
    drawn,
    flipped,
    write_evaluation,
)

HARDLY_BETTER = flipped(BETTER, 2, 1.0)
BEST = flipped(BASE, 120, 1.0)


def comparison(scores, opponent="base") -> WinRate:
    return WinRate(
        candidate="sft",
        opponent=opponent,
        judge="people (2)" if len(scores) else "",
        scores=tuple(map(float, scores)),
        win_rate=float(np.mean(scores)) if len(scores) else None,
        low=0.4 if len(scores) else None,
        high=0.9 if len(scores) else None,
        first_preferred=None,
        consistent=None,
        agreement=None,
    )


@pytest.fixture
def gate(make_context, tmp_path):
    """Evaluations are scores, or scores with nats; several candidates come as a dict of dicts."""

    def gate(
        base, candidates, champion=None, preferred=None, **settings: object
    ) -> tuple[StageResult, Verdict, str]:
        folder = tmp_path / f"gate-{len(list(tmp_path.glob('gate-*')))}"

        def write(name, evaluation):
            scores, nats = evaluation if isinstance(evaluation, tuple) else (evaluation, ())
            return "evaluation", write_evaluation(folder / name, scores, nats)

        several = isinstance(candidates, dict) and all(
            isinstance(one, dict | tuple) for one in candidates.values()
        )
        inputs = {"base": write("base", base)}
        if several:
            for name, one in candidates.items():
                inputs[f"candidate:{name}"] = write(name, one)
        else:
            inputs["candidate"] = write("candidate", candidates)
        if champion == "the candidate":
            inputs["champion"] = inputs["candidate"]
        elif champion is not None:
            inputs["champion"] = write("champion", champion)
        for name, found in (preferred or {}).items():
            where = folder / name.replace(":", "-")
            where.mkdir()
            found.save(where)
            inputs[name] = ("comparison", where)
        config = GateConfig(
            bootstrap_samples=1000,
            candidates=tuple(candidates) if several else (),
            champion="demo" if champion is not None else None,
            **settings,  # type: ignore[arg-type]
        )
        context = make_context(config, inputs)
        result = main(context)
        return result, Verdict.load(context.output), (context.output / "verdict.md").read_text()

    return gate


# The champion


def test_as_good_as_the_champion_is_good_enough(gate):
    result, verdict, page = gate({"quiz": BASE}, {"quiz": HARDLY_BETTER}, {"quiz": BETTER})
    assert verdict.verdict == "pass"
    versus = verdict.champion
    assert versus is not None
    assert (versus.opponent, versus.verdict) == ("champion demo", "pass")
    assert versus.checks[0].difference == pytest.approx(2 / 400)
    assert verdict.checks[0].difference == pytest.approx(62 / 400)
    assert verdict.reasons == (
        verdict.checks[0].sentence,
        f"champion demo: {versus.checks[0].sentence}",
    )
    assert result.headline.endswith(", champion demo pass")
    assert result.metrics["passed_champion"] == 1.0
    assert "### Against champion demo: pass" in page
    assert "| task | metric | asked | champion demo | candidate |" in page


def test_better_than_the_base_and_worse_than_the_champion_fails(gate):
    result, verdict, _ = gate({"quiz": BASE}, {"quiz": BETTER}, {"quiz": BEST})
    assert verdict.checks[0].verdict == "pass"
    assert verdict.champion is not None
    assert verdict.champion.verdict == verdict.verdict == "fail"
    [reason] = verdict.reasons
    assert reason.startswith("champion demo: quiz: -0.150 [")
    assert result.metrics["passed"] == result.metrics["passed_champion"] == 0.0


def test_worse_than_the_base_fails_beside_any_champion(gate):
    _, verdict, _ = gate({"quiz": BASE}, {"quiz": WORSE}, {"quiz": WORSE})
    assert verdict.verdict == "fail"
    assert verdict.champion is not None
    assert verdict.champion.verdict == "pass"


def test_the_champion_need_not_prove_itself_against_itself(gate):
    base, better = {"quiz": [0.0] * 20}, {"quiz": [1.0] * 20}
    # Another model with the same answers to so few items would have to.
    assert gate(base, better, better)[1].verdict == "not enough evidence"
    _, verdict, page = gate(base, better, "the candidate")
    assert verdict.verdict == "pass"
    assert verdict.champion is None
    assert verdict.reasons[-1] == "champion demo: is this very model"
    assert "- champion demo: is this very model" in page


def test_a_champion_that_is_to_be_ignored_is_not_looked_at(gate):
    _, verdict, page = gate(
        {"quiz": BASE}, {"quiz": BETTER}, {"quiz": BEST}, against_champion="ignore"
    )
    assert verdict.verdict == "pass"
    assert verdict.champion is None
    assert "Against champion" not in page


@pytest.mark.parametrize(
    ("champion", "expected", "words"),
    [
        (BASE, "pass", "better on the whole"),
        (flipped(BETTER, 1, 0.0), "not enough evidence", "not shown to be better (would have"),
    ],
)
def test_a_candidate_that_must_improve_on_the_champion_is_better_on_the_whole(
    gate, champion, expected, words
):
    _, verdict, page = gate(
        {"quiz": BASE, "other": BASE},
        {"quiz": BETTER, "other": BETTER},
        {"quiz": champion, "other": champion},
        against_champion="must_improve",
    )
    assert verdict.verdict == expected
    assert verdict.champion is not None
    assert {check.verdict for check in verdict.champion.checks} == {"pass"}
    assert "over the mean of 2 tasks" in verdict.champion.improvement
    assert words in verdict.champion.improvement
    assert f"champion demo: {verdict.champion.improvement}" in verdict.reasons
    assert f"On the whole: {verdict.champion.improvement}" in page


def test_worse_on_the_whole_fails_where_better_is_asked(gate):
    # Within the drop that is accepted, and shown to be one.
    many = drawn(0.5, 4000)
    slightly_worse = flipped(many, 30, 0.0)
    scores = {"quiz": many}, {"quiz": slightly_worse}, {"quiz": many}
    assert gate(*scores)[1].verdict == "pass"
    _, verdict, _ = gate(*scores, against_champion="must_improve")
    assert verdict.verdict == "fail"
    assert verdict.reasons[0].endswith("over 1 task; worse on the whole")


def test_without_tasks_improvement_on_the_champion_is_perplexity(gate):
    rows = {}, LESS
    asked = {"against_champion": "must_improve"}
    _, verdict, _ = gate(({}, NATS), rows, ({}, NATS), **asked)
    assert verdict.verdict == "pass"
    assert verdict.champion is not None
    assert "over held-out rows, in nats a token" in verdict.champion.improvement
    assert gate(({}, NATS), rows, rows, **asked)[1].verdict == "not enough evidence"


def test_what_must_improve_need_only_be_as_good_as_the_champion(gate):
    scores = ({"quiz": BETTER}, LESS)
    _, verdict, _ = gate(
        ({"quiz": BASE}, NATS), scores, scores, must_improve=("quiz",), perplexity="must_improve"
    )
    assert verdict.verdict == "pass"
    assert verdict.champion is not None
    assert verdict.champion.checks[0].requirement == "must_not_drop"
    assert verdict.champion.perplexities[0].requirement == "must_not_rise"


def test_bounds_by_task_hold_beside_the_champion_too(gate):
    scores = {"quiz": BASE}, {"quiz": BETTER}, {"quiz": BEST}
    assert gate(*scores, max_drops={"quiz": 0.3})[1].verdict == "pass"


def test_perplexity_is_compared_with_the_champion(gate):
    _, verdict, _ = gate(({}, MORE), ({}, NATS), ({}, LESS))
    assert verdict.perplexity is not None
    assert verdict.perplexity.verdict == "pass"
    assert verdict.verdict == "fail"
    assert verdict.reasons[0].startswith("champion demo: perplexity: 14.0 -> 26.8 on 40 rows")


def test_one_weak_drop_is_no_failure_among_the_checks_of_two_opponents(gate):
    weak = flipped(flipped(BASE, 44, 0.0), 22, 1.0)
    assert gate({"quiz": BASE}, {"quiz": weak})[1].verdict == "fail"
    _, verdict, _ = gate({"quiz": BASE}, {"quiz": weak}, {"quiz": weak})
    assert verdict.verdict == "not enough evidence"
    assert "beyond chance among so many checks" in verdict.checks[0].sentence


def test_each_of_several_candidates_is_compared_with_the_champion(gate):
    result, verdict, page = gate(
        {"quiz": BASE}, {"dpo": {"quiz": BETTER}, "kto": {"quiz": BEST}}, {"quiz": BEST}
    )
    assert verdict.choice == "kto"
    assert {name: one.champion.verdict for name, one in verdict.candidates.items()} == {
        "dpo": "fail",
        "kto": "pass",
    }
    assert verdict.champion == verdict.candidates["kto"].champion
    assert page.count("### Against champion demo") == 2
    assert result.metrics["dpo/passed_champion"] == 0.0


def test_a_champion_measured_otherwise_is_refused_by_name(make_context, tmp_path):
    folders = {
        "base": write_evaluation(tmp_path / "base", {"quiz": BASE}),
        "candidate": write_evaluation(tmp_path / "new", {"quiz": BASE}),
        "champion": write_evaluation(tmp_path / "champion", {"quiz": BASE}, seed=1),
    }
    context = make_context(
        GateConfig(champion="demo"),
        {name: ("evaluation", folder) for name, folder in folders.items()},
    )
    with pytest.raises(DataError, match=r"(?s)champion demo and candidate .*seed: 1 and 0"):
        main(context)


# An earlier stage in place of the base


def test_the_page_names_the_stage_that_the_candidate_is_compared_with(gate):
    _, verdict, page = gate({"quiz": BASE}, {"quiz": BETTER}, against="evaluate-sft")
    assert verdict.against == "evaluate-sft"
    assert "| task | metric | asked | evaluate-sft | candidate |" in page
    assert "candidate minus evaluate-sft" in page


# What a judge preferred


@pytest.mark.parametrize(
    ("won", "expected", "words"),
    [
        ([1] * 45 + [0] * 15, "pass", "more than 0.5 is shown (would have seen one of 0."),
        ([1] * 15 + [0] * 45, "fail", "less than 0.5 is shown"),
        ([1] * 32 + [0] * 28, "not enough evidence", "more than 0.5 is not shown; about "),
        ([1] * 9, "not enough evidence", "fewer than 10 judged prompts show nothing"),
        ([0.5] * 60, "not enough evidence", "more prompts would hardly settle it"),
    ],
)
def test_more_than_the_required_share_of_prompts_is_won_or_it_does_not_pass(
    gate, won, expected, words
):
    _, verdict, page = gate(
        {"quiz": BASE}, {"quiz": BETTER}, preferred={"comparison": comparison(won)}
    )
    check = verdict.win_rate
    assert check is not None
    assert check.verdict == verdict.verdict == expected
    assert words in check.sentence
    assert check.sentence.startswith(f"win rate against base: {np.mean(won):.2f}")
    assert "judged by people (2)" in page


def test_an_open_win_rate_asks_for_the_prompts_that_would_settle_it(gate):
    won = comparison([1] * 32 + [0] * 28)
    result, verdict, _ = gate({"quiz": BASE}, {"quiz": BETTER}, preferred={"comparison": won})
    check = verdict.win_rate
    assert check is not None
    assert check.prompts_needed is not None
    assert 1000 < check.prompts_needed < 2000  # 6.2 * 0.25 / 0.033^2, as for any share
    assert result.metrics["win_rate"] == pytest.approx(32 / 60)
    assert "win rate 0.53 [0.4" in result.headline


def test_another_share_may_be_required(gate):
    won = {"comparison": comparison([1] * 45 + [0] * 15)}
    scores = {"quiz": BASE}, {"quiz": BETTER}
    assert gate(*scores, preferred=won, min_win_rate=0.7)[1].verdict == "not enough evidence"
    _, verdict, _ = gate(*scores, preferred=won, min_win_rate=None)
    assert (verdict.verdict, verdict.win_rate) == ("pass", None)


def test_before_anyone_has_judged_the_verdict_is_open_and_says_what_to_do(gate):
    result, verdict, page = gate(
        {"quiz": BASE}, {"quiz": BETTER}, preferred={"comparison": comparison([])}
    )
    assert verdict.verdict == "not enough evidence"
    assert verdict.win_rate is not None
    assert verdict.win_rate.low is None
    [reason] = verdict.reasons
    assert "nobody has judged yet; fill in the sheets" in reason
    assert "nobody has judged yet" in page
    assert result.headline.endswith("win rate not judged yet")


def test_a_lost_comparison_that_is_weak_is_no_failure_among_many_checks(gate):
    lost = {"comparison": comparison([1] * 21 + [0] * 39)}
    assert gate({"quiz": BASE}, {"quiz": BETTER}, preferred=lost)[1].verdict == "fail"
    tasks = {f"task{number}": BASE for number in range(8)}
    _, verdict, _ = gate(tasks, dict.fromkeys(tasks, BETTER), preferred=lost)
    assert verdict.verdict == "not enough evidence"
    assert "not beyond chance" in verdict.reasons[0]


def test_a_comparison_alone_is_something_to_decide_on(gate):
    won = {"comparison": comparison([1] * 45 + [0] * 15)}
    assert gate({}, ({}, ()), preferred=won)[1].verdict == "pass"


def test_each_candidate_has_its_own_comparison(gate):
    _, verdict, _ = gate(
        {"quiz": BASE},
        {"dpo": {"quiz": BETTER}, "kto": {"quiz": BEST}},
        preferred={
            "comparison:dpo": comparison([1] * 50 + [0] * 10),
            "comparison:kto": comparison([1] * 10 + [0] * 50),
        },
    )
    assert verdict.choice == "dpo"
    assert verdict.candidates["kto"].verdict == "fail"
    assert verdict.win_rate == verdict.candidates["dpo"].win_rate


@pytest.mark.parametrize("prompts", [20, 60, 200])
def test_of_candidates_that_win_half_of_the_prompts_at_most_one_in_twenty_passes(prompts):
    config = GateConfig(bootstrap_samples=1000)
    passes = [
        won
        for won in range(prompts + 1)
        if check_win_rate(comparison([1] * won + [0] * (prompts - won)), 0.5, config).verdict
        == "pass"
    ]
    assert stats.binom.pmf(passes, prompts, 0.5).sum() < 0.05
    assert min(passes) <= 0.75 * prompts


def test_means_over_raters_count_as_what_they_are(gate):
    # Two raters who often differ say the same on average; their mean is known better.
    scores = [0.75] * 40 + [0.25] * 20
    _, verdict, _ = gate(
        {"quiz": BASE}, {"quiz": BETTER}, preferred={"comparison": comparison(scores)}
    )
    assert verdict.win_rate is not None
    assert verdict.win_rate.win_rate == pytest.approx(35 / 60)
    assert verdict.verdict == "pass"
