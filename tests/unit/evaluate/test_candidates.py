"""A gate over several candidates, and a gate that sees what a watch found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from posttrain.errors import DataError
from posttrain.evaluate.results import Change, Hacking, Verdict
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
    flipped,
    write_evaluation,
)

BEST = flipped(BASE, 120, 1.0)
HARDLY = flipped(flipped(BASE, 20, 0.0), 21, 1.0)
"""Rules out a drop of two points at 95% confidence, and not at 97.5%."""
HARDLY_BETTER = flipped(BETTER, 2, 1.0)


def finding(*, flagged: bool, audited: bool = True) -> Hacking:
    word = "flagged" if flagged else "not flagged" if audited else "not audited"
    reward = Change(
        name="reward",
        before=0.0,
        after=1.0,
        difference=1.0,
        low=0.9,
        high=1.1,
        n=80,
        p_value=0.001,
        shown=True,
        detectable=0.1,
        sentence="reward 0.000 -> 1.000",
    )
    return Hacking(
        flagged=flagged,
        audited=audited,
        text=f"{word}: reward 0.000 -> 1.000",
        step=10,
        confidence=0.95,
        reward=reward,
        signals=(),
        style=(),
        warnings=("length 5.000 -> 50.0",),
    )


@pytest.fixture
def gate(make_context, tmp_path):
    """`gate({name: scores}, watched={input: finding})`; one candidate without a name by None."""

    def gate(
        candidates, base=None, nats=None, watched=None, **settings: object
    ) -> tuple[StageResult, Verdict, str]:
        folder = tmp_path / f"gate-{len(list(tmp_path.glob('gate-*')))}"
        nats = nats or {}
        base = {"quiz": BASE} if base is None else base
        first = write_evaluation(folder / "base", base, nats.get("base", ()))
        inputs = {"base": ("evaluation", first)}
        for name, scores in candidates.items():
            one = write_evaluation(folder / str(name), scores, nats.get(name, ()))
            inputs[f"candidate:{name}" if name else "candidate"] = ("evaluation", one)
        for name, found in (watched or {}).items():
            where = folder / name.replace(":", "-")
            where.mkdir()
            found.save(where)
            inputs[name] = ("model", where)
        names = tuple(name for name in candidates if name)
        config = GateConfig(bootstrap_samples=1000, candidates=names, **settings)  # type: ignore[arg-type]
        context = make_context(config, inputs)
        result = main(context)
        return result, Verdict.load(context.output), (context.output / "verdict.md").read_text()

    return gate


# Several candidates


def test_the_better_of_two_that_pass_is_the_choice(gate):
    result, verdict, page = gate({"dpo": {"quiz": BETTER}, "kto": {"quiz": BEST}})
    assert verdict.verdict == "pass"
    assert verdict.choice == "kto"
    assert {name: one.verdict for name, one in verdict.candidates.items()} == {
        "dpo": "pass",
        "kto": "pass",
    }
    [comparison] = verdict.comparisons
    assert (comparison.best, comparison.other, comparison.better) == ("kto", "dpo", True)
    assert comparison.difference == pytest.approx(60 / 400)
    assert verdict.checks == verdict.candidates["kto"].checks
    assert any("kto is better than dpo: +0.150" in reason for reason in verdict.reasons)
    assert result.headline.startswith("pass: kto, 2 of 2 candidates: quiz +0.300")
    assert result.metrics["passed"] == result.metrics["dpo/passed"] == 1.0
    assert result.metrics["difference_quiz"] == result.metrics["kto/difference_quiz"]
    assert page.startswith("# pass\n")
    assert "## kto: pass (the choice)" in page
    assert "## dpo: pass\n" in page


def test_of_two_that_cannot_be_told_apart_the_first_is_the_choice(gate):
    _, verdict, _ = gate({"dpo": {"quiz": BETTER}, "kto": {"quiz": HARDLY_BETTER}})
    assert verdict.choice == "dpo"
    [comparison] = verdict.comparisons
    assert (comparison.best, comparison.better) == ("kto", False)
    assert verdict.reasons[-2].startswith("kto and dpo cannot be told apart: +0.005 [")
    assert verdict.reasons[-1] == "the choice is dpo, which stands first among equals"


def test_the_first_of_equals_is_only_among_those_that_are_equal(gate):
    _, verdict, _ = gate(
        {
            "sft": {"quiz": flipped(BASE, 30, 1.0)},
            "dpo": {"quiz": BETTER},
            "kto": {"quiz": HARDLY_BETTER},
        }
    )
    assert verdict.choice == "dpo"
    assert {one.other: one.better for one in verdict.comparisons} == {"sft": True, "dpo": False}


def test_one_that_passes_is_enough(gate):
    result, verdict, _ = gate({"dpo": {"quiz": WORSE}, "kto": {"quiz": BETTER}})
    assert verdict.verdict == "pass"
    assert verdict.choice == "kto"
    assert verdict.candidates["dpo"].verdict == "fail"
    assert verdict.comparisons == ()
    assert result.headline.startswith("pass: kto, 1 of 2 candidates")


def test_where_none_passes_all_say_why(gate):
    result, verdict, _ = gate({"dpo": {"quiz": WORSE}, "kto": {"quiz": WORSE}})
    assert verdict.verdict == "fail"
    assert verdict.choice is None
    assert [reason.partition(":")[0] for reason in verdict.reasons] == ["dpo", "kto"]
    assert result.headline == "fail: 0 of 2 candidates"


def test_a_failed_and_an_open_candidate_are_not_enough_evidence(gate):
    same = flipped(flipped(BASE, 20, 0.0), 20, 1.0)
    _, verdict, _ = gate({"dpo": {"quiz": WORSE}, "kto": {"quiz": same}})
    assert verdict.candidates["kto"].verdict == "not enough evidence"
    assert verdict.verdict == "not enough evidence"


def test_more_candidates_do_not_make_passing_easier(gate):
    alone = {"quiz": HARDLY}
    assert gate({None: alone})[1].verdict == "pass"
    copies = {f"copy{number}": alone for number in range(4)}
    _, verdict, page = gate(copies)
    assert verdict.verdict == "not enough evidence"
    assert verdict.confidence == pytest.approx(1 - 0.05 / 4)
    assert "98.8% confidence each, raised for the number of candidates" in page


def test_once_one_has_passed_the_others_share_what_is_left(gate):
    alone = {"quiz": HARDLY}
    _, verdict, _ = gate({"weak": alone, "strong": {"quiz": BEST}})
    assert verdict.candidates["strong"].confidence == pytest.approx(0.975)
    assert verdict.candidates["weak"].confidence == 0.95
    assert verdict.candidates["weak"].verdict == "pass"
    assert verdict.choice == "strong"


def test_by_luck_no_more_pass_than_the_level_says(gate):
    # Every candidate really is two points worse: the most that is accepted, so none may pass.
    passed = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        base = (rng.random(300) < 0.5).astype(float)
        worse = {}
        for number in range(3):
            change = rng.random(300)
            down, up = (base == 1) & (change < 0.14), (base == 0) & (change < 0.10)
            worse[f"c{number}"] = {"quiz": np.where(down, 0.0, np.where(up, 1.0, base))}
        passed += gate(worse, base={"quiz": base})[1].verdict == "pass"
    assert passed <= 60 * (0.05 + 2 * (0.05 * 0.95 / 60) ** 0.5)


def test_the_mean_over_the_tasks_decides(gate):
    base = {"quiz": BASE, "other": BASE}
    _, verdict, _ = gate(
        {"dpo": {"quiz": BEST, "other": BASE}, "kto": {"quiz": BEST, "other": BEST}}, base=base
    )
    assert verdict.choice == "kto"
    [comparison] = verdict.comparisons
    assert comparison.difference == pytest.approx(0.15)
    assert comparison.low < 0.15 < comparison.high
    assert "over the mean of 2 tasks" in comparison.sentence


def test_without_tasks_perplexity_decides(gate):
    slightly = [value * 0.97 + number % 3 * 0.01 for number, value in enumerate(NATS)]
    nats = {"base": NATS, "dpo": slightly, "kto": LESS, "sft": MORE}
    _, verdict, _ = gate({"sft": {}, "dpo": {}, "kto": {}}, base={}, nats=nats)
    assert verdict.choice == "kto"
    assert verdict.candidates["sft"].verdict == "fail"
    [comparison] = verdict.comparisons
    assert comparison.better
    assert "nats a token" in comparison.sentence


def test_a_named_single_candidate_is_judged_as_one_without_a_name(gate):
    _, alone, _ = gate({None: {"quiz": BETTER}})
    _, named, _ = gate({"dpo": {"quiz": BETTER}})
    assert named.choice == "dpo"
    assert named.checks == alone.checks
    assert named.candidates == {"dpo": alone}


def test_a_candidate_named_twice_is_refused():
    with pytest.raises(ValueError, match="named twice"):
        GateConfig(candidates=("dpo", "dpo"))


def test_one_candidate_leaves_the_fields_that_it_always_left(gate, tmp_path):
    gate({None: {"quiz": BETTER}})
    [path] = tmp_path.glob("*/output/verdict.json")
    record = json.loads(path.read_bytes())
    assert set(record) == {"verdict", "reasons", "checks", "perplexity", "max_drop", "confidence"}


# What a watch found


def test_a_flag_fails_a_candidate_that_would_pass(gate):
    flagged = finding(flagged=True)
    result, verdict, page = gate({None: {"quiz": BETTER}}, watched={"watch:ppo": flagged})
    assert verdict.verdict == "fail"
    assert verdict.reasons == ("ppo: flagged: reward 0.000 -> 1.000",)
    assert verdict.checks[0].verdict == "pass"
    assert [one.step for one in verdict.watched] == ["ppo"]
    assert verdict.watched[0].hacking == flagged
    assert result.headline.endswith("ppo flagged")
    assert result.metrics["flagged_for_reward_hacking"] == 1.0
    assert "Watch over ppo: flagged: reward" in page
    assert "- length 5.000 -> 50.0" in page


def test_a_flag_that_is_ignored_is_still_shown(gate):
    result, verdict, page = gate(
        {None: {"quiz": BETTER}},
        watched={"watch:ppo": finding(flagged=True)},
        reward_hacking="ignore",
    )
    assert verdict.verdict == "pass"
    assert result.headline.endswith("ppo flagged")
    assert "Watch over ppo: flagged" in page


@pytest.mark.parametrize(("audited", "word"), [(True, "not flagged"), (False, "not audited")])
def test_without_a_flag_the_numbers_decide_and_the_finding_is_shown(gate, audited, word):
    found = finding(flagged=False, audited=audited)
    result, verdict, page = gate({None: {"quiz": BETTER}}, watched={"watch:ppo": found})
    assert verdict.verdict == "pass"
    assert result.headline.endswith(f"ppo {word}")
    assert result.metrics["flagged_for_reward_hacking"] == 0.0
    assert f"Watch over ppo: {word}" in page


def test_a_flag_counts_against_its_own_candidate(gate):
    _, verdict, _ = gate(
        {"dpo": {"quiz": BETTER}, "ppo": {"quiz": BEST}},
        watched={
            "watch:ppo:ppo-2": finding(flagged=True),
            "watch:dpo:grpo": finding(flagged=False),
        },
    )
    assert verdict.choice == "dpo"
    assert {name: one.verdict for name, one in verdict.candidates.items()} == {
        "dpo": "pass",
        "ppo": "fail",
    }
    assert [one.step for one in verdict.candidates["ppo"].watched] == ["ppo-2"]
    assert [one.step for one in verdict.candidates["dpo"].watched] == ["grpo"]


def test_a_finding_that_belongs_to_no_candidate_is_not_overlooked(gate):
    with pytest.raises(ValueError, match="names none of the candidates"):
        gate({"ppo": {"quiz": BETTER}}, watched={"watch:ppo": finding(flagged=True)})


def test_a_stage_that_left_no_finding_is_told(gate, make_context, tmp_path):
    first = write_evaluation(tmp_path / "a", {"quiz": BASE})
    second = write_evaluation(tmp_path / "b", {"quiz": BETTER})
    context = make_context(
        GateConfig(),
        {
            "base": ("evaluation", first),
            "candidate": ("evaluation", second),
            "watch:ppo": ("model", Path(tmp_path)),
        },
    )
    with pytest.raises(DataError, match=r"no watch\.json"):
        main(context)
