from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from posttrain.errors import DataError
from posttrain.evaluate.items import Item, PerplexityRow, write_items, write_perplexity
from posttrain.evaluate.results import (
    EvaluationResults,
    PerplexityResult,
    Settings,
    TaskResult,
    TaskSettings,
    Verdict,
)
from posttrain.evaluate.verdict import judge
from posttrain.recipe.gate import GateConfig
from posttrain.stages.gate import main
from posttrain.stages.program import StageResult

Scores = dict[str, Sequence[float]]


def write_evaluation(
    folder: Path,
    scores: Scores,
    nats: Sequence[float] = (),
    *,
    seed: int = 0,
    groups: int = 1,
    higher_is_better: bool = True,
    digest: str = "d",
    tokens: int = 10,
    size: int = 30,
    others: Mapping[str, Sequence[float]] | None = None,
    **different: object,
) -> Path:
    """An evaluation as the evaluate stage writes it; `different` are further settings."""
    folder.mkdir(parents=True)
    items = [
        Item(
            task=task,
            group=f"{task}_{number % groups}",
            item_id=number,
            item_digest=f"{digest}{number}",
            metric="acc",
            value=float(value),
            metrics={"acc": float(value)},
            log_likelihoods=(),
        )
        for task, values in scores.items()
        for number, value in enumerate(values)
    ]
    write_items(folder, items)
    others = others or {}
    rows = [
        PerplexityRow(str(i), float(n), tokens, size, dataset)
        for dataset, values in {"main": nats, **others}.items()
        for i, n in enumerate(values)
    ]
    write_perplexity(folder, rows)
    tasks = [
        TaskResult(
            task=task,
            metric="acc",
            value=float(np.mean(values)),
            standard_error=None,
            n=len(values),
            higher_is_better=higher_is_better,
            metrics={},
            groups={},
        )
        for task, values in scores.items()
    ]
    plain = {
        "lm_eval": "0",
        "tasks": (),
        "limit": None,
        "seed": seed,
        "dtype": "float32",
        "questions_in_chat_template": False,
        "chat_template": None,
        "perplexity_rows": 200,
        "perplexity_max_length": 1024,
    }
    settings = Settings.model_validate({**plain, **different})
    EvaluationResults(
        tasks=tuple(tasks),
        perplexity=perplexity(nats, tokens, size) if len(nats) else None,
        other_perplexities={
            name: perplexity(values, tokens, size) for name, values in others.items()
        },
        settings=settings,
        settings_digest=settings.digest,
    ).save(folder)
    return folder


def perplexity(nats: Sequence[float], tokens: int, size: int) -> PerplexityResult:
    mean = float(np.mean(nats)) / tokens
    return PerplexityResult(
        perplexity=float(np.exp(mean)),
        nats_per_token=mean,
        bits_per_byte=float(np.mean(nats)) / size / math.log(2),
        rows=len(nats),
        tokens=tokens * len(nats),
        bytes=size * len(nats),
    )


def asked(task: str, examples: int) -> TaskSettings:
    return TaskSettings(name=task, version="1", num_fewshot=examples)


@pytest.fixture
def gate(make_context, tmp_path):
    def gate(base: Path, candidate: Path, **settings: object) -> tuple[StageResult, Verdict]:
        config = GateConfig(bootstrap_samples=1000, **settings)  # type: ignore[arg-type]
        context = make_context(
            config, {"base": ("evaluation", base), "candidate": ("evaluation", candidate)}
        )
        result = main(context)
        verdict = Verdict.load(context.output)
        assert (context.output / "verdict.md").read_text().startswith(f"# {verdict.verdict}\n")
        return result, verdict

    return gate


@pytest.fixture
def compare(gate, tmp_path):
    """Judge one set of scores against another."""

    def compare(base: Scores, candidate: Scores, nats=((), ()), options=None, **settings: object):
        options = options or {}
        name = str(len(list(tmp_path.glob("pair-*"))))
        first = write_evaluation(tmp_path / f"pair-{name}" / "base", base, nats[0], **options)
        second = write_evaluation(tmp_path / f"pair-{name}" / "new", candidate, nats[1], **options)
        return gate(first, second, **settings)

    return compare


def drawn(share: float, n: int = 400, seed: int = 0) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).random(n) < share]


def flipped(scores: Sequence[float], count: int, to: float) -> list[float]:
    """The scores with the first `count` of those that can be changed set to `to`."""
    out, left = list(scores), count
    for index, value in enumerate(out):
        if left and value != to:
            out[index], left = to, left - 1
    return out


BASE = drawn(0.5)
BETTER = flipped(BASE, 60, 1.0)
WORSE = flipped(BASE, 60, 0.0)
NATS = [30.0 + number % 7 for number in range(40)]
LESS = [value * 0.8 + number % 3 * 0.1 for number, value in enumerate(NATS)]
MORE = [value * 1.2 + number % 3 * 0.1 for number, value in enumerate(NATS)]


def test_a_better_candidate_passes(compare):
    result, verdict = compare({"quiz": BASE}, {"quiz": BETTER}, (NATS, LESS))
    assert verdict.verdict == "pass"
    [check] = verdict.checks
    assert check.difference == pytest.approx(60 / 400)
    assert check.candidate == pytest.approx(check.base + 60 / 400)
    assert 0 < check.low < check.difference < check.high
    assert check.mcnemar_p is not None
    assert check.mcnemar_p < 1e-9
    assert check.items_needed is None
    assert result.metrics["passed"] == 1.0
    assert result.metrics["difference_quiz"] == check.difference
    assert result.metrics["low_quiz"] == check.low
    assert result.headline.startswith("pass: quiz +0.150 [+0.1")
    assert result.headline.endswith("perplexity 26.8 -> 14.0")


def test_a_worse_candidate_fails(compare):
    result, verdict = compare({"quiz": BASE}, {"quiz": WORSE}, (NATS, LESS))
    assert verdict.verdict == "fail"
    assert verdict.reasons == (verdict.checks[0].sentence,)
    assert "a drop beyond 0.02 is shown" in verdict.checks[0].sentence
    assert result.metrics["passed"] == 0.0


def test_few_items_are_not_enough_evidence_and_say_how_many_would_be(compare):
    base = drawn(0.5, 60)
    changed = flipped(flipped(base, 3, 0.0), 3, 1.0)
    _, verdict = compare({"quiz": base}, {"quiz": changed})
    assert verdict.verdict == "not enough evidence"
    [check] = verdict.checks
    assert check.items_needed is not None
    assert check.items_needed > 60
    assert f"about {check.items_needed:,} items would settle it" in check.sentence
    assert check.smallest_detectable_drop > 0.02


def test_five_identical_answers_prove_nothing(compare):
    same = [1.0, 0.0, 1.0, 1.0, 0.0]
    _, verdict = compare({"quiz": same}, {"quiz": same})
    assert verdict.verdict == "not enough evidence"


def test_one_open_check_keeps_the_others_from_passing(compare):
    few = drawn(0.5, 20)
    _, verdict = compare({"many": BASE, "few": few}, {"many": BETTER, "few": few})
    assert [check.verdict for check in verdict.checks] == ["pass", "not enough evidence"]
    assert verdict.verdict == "not enough evidence"
    assert verdict.reasons == (verdict.checks[1].sentence,)


def test_a_failure_outweighs_open_checks(compare):
    few = drawn(0.5, 20)
    _, verdict = compare({"many": BASE, "few": few}, {"many": WORSE, "few": few})
    assert verdict.verdict == "fail"


def test_one_weak_drop_among_many_tasks_is_not_a_failure(compare):
    # Just enough for a failure alone (p about 0.03), as one of eight it may be chance.
    weak = flipped(flipped(BASE, 44, 0.0), 22, 1.0)
    [alone] = compare({"weak": BASE}, {"weak": weak})[1].checks
    assert alone.verdict == "fail"
    assert 0.05 / 8 < alone.p_worse < 0.05
    rest = {f"task{number}": BASE for number in range(7)}
    better = dict.fromkeys(rest, BETTER)
    _, verdict = compare({"weak": BASE, **rest}, {"weak": weak, **better})
    assert verdict.checks[0].verdict == "not enough evidence"
    assert "beyond chance among so many checks" in verdict.checks[0].sentence
    assert verdict.verdict == "not enough evidence"


def test_where_lower_is_better_a_rise_is_a_drop(compare):
    options = {"higher_is_better": False}
    _, verdict = compare({"errors": BASE}, {"errors": BETTER}, options=options)
    assert verdict.checks[0].difference == pytest.approx(-60 / 400)
    assert verdict.verdict == "fail"


def test_subjects_are_clusters(compare):
    changed = [1.0 - v if number % 20 < 2 else v for number, v in enumerate(BASE)]
    [flat] = compare({"mmlu": BASE}, {"mmlu": changed})[1].checks
    [clustered] = compare({"mmlu": BASE}, {"mmlu": changed}, options={"groups": 20})[1].checks
    assert clustered.difference == flat.difference
    assert clustered.high - clustered.low != flat.high - flat.low


@pytest.mark.parametrize(
    ("requirement", "candidate", "expected"),
    [
        ("must_not_rise", LESS, "pass"),
        ("must_not_rise", NATS, "pass"),
        ("must_not_rise", MORE, "fail"),
        ("must_improve", LESS, "pass"),
        ("must_improve", NATS, "not enough evidence"),
        ("must_improve", MORE, "fail"),
    ],
)
def test_perplexity_requirements(compare, requirement, candidate, expected):
    _, verdict = compare({}, {}, (NATS, candidate), perplexity=requirement)
    assert verdict.verdict == expected
    assert verdict.perplexity is not None
    assert verdict.perplexity.requirement == requirement


def test_a_handful_of_rows_shows_nothing_about_perplexity(compare):
    _, verdict = compare({}, {}, (NATS[:5], LESS[:5]))
    assert verdict.verdict == "not enough evidence"
    assert verdict.perplexity is not None
    assert verdict.perplexity.low is None


def test_ignored_perplexity_does_not_decide(compare):
    _, verdict = compare({"q": BASE}, {"q": BETTER}, (NATS, MORE), perplexity="ignore")
    assert verdict.verdict == "pass"
    assert verdict.perplexity is None


def test_nothing_to_compare_is_an_error(compare):
    with pytest.raises(DataError, match="nothing to compare"):
        compare({}, {})
    with pytest.raises(DataError, match="do not ignore `perplexity`"):
        compare({}, {}, (NATS, NATS), perplexity="ignore")


def test_different_settings_are_refused_by_name(gate, tmp_path):
    base = write_evaluation(tmp_path / "base", {"quiz": BASE}, seed=0)
    other = write_evaluation(tmp_path / "new", {"quiz": BASE}, seed=1)
    with pytest.raises(DataError, match=r"(?s)different settings.*seed: 0 and 1"):
        gate(base, other)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"quiz": BASE}, {"digest": "other"}, "item 0 of `quiz_0` is not the same question"),
        ({"quiz": BASE[:-1]}, {}, "item 399 of `quiz_0` is not the same question"),
        ({"quiz": [*BASE, 1.0]}, {}, "item 400 of `quiz_0` .* was asked of the candidate and not"),
    ],
)
def test_different_items_are_refused(gate, tmp_path, scores, options, message):
    base = write_evaluation(tmp_path / "base", {"quiz": BASE})
    other = write_evaluation(tmp_path / "new", scores, **options)
    with pytest.raises(DataError, match=message):
        gate(base, other)


@pytest.mark.parametrize(
    ("nats", "options", "message"),
    [
        (NATS[:-1], {}, "held-out rows of base and candidate differ"),
        ((), {}, "held-out rows of base and candidate differ"),
        (NATS, {"tokens": 11, "size": 29}, "(?s)different tokens.*`0` with 30 and 29 bytes"),
    ],
)
def test_different_rows_are_refused(gate, tmp_path, nats, options, message):
    base = write_evaluation(tmp_path / "base", {"quiz": BASE}, NATS)
    other = write_evaluation(tmp_path / "new", {"quiz": BASE}, nats, **options)
    with pytest.raises(DataError, match=message):
        gate(base, other)


def test_a_folder_without_an_evaluation_is_told(gate, tmp_path):
    base = write_evaluation(tmp_path / "base", {"quiz": BASE})
    with pytest.raises(DataError, match=r"no results\.json"):
        gate(base, tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"backend": "vllm"}, "backend: 'hf' and 'vllm'"),
        (
            {"test_sets": ({"dataset": "tickets", "metrics": ["f1"], "limit": 100},)},
            r"test_sets: tickets\[0\]: limit: 50 and 100",
        ),
        (
            {"tasks": tuple(asked(f"mmlu_{number}", 5) for number in range(57))},
            r"(?s)tasks: mmlu_0: 'version 1, 0 examples' and 'version 1, 5 examples'"
            r".*mmlu_2.*tasks: and 54 more$",
        ),
        ({"chat_template": "2" * 64}, "chat_template: '111.*' and '222"),
    ],
)
def test_each_setting_that_differs_is_told_in_words(gate, tmp_path, other, message):
    mine = {
        "tasks": tuple(asked(f"mmlu_{number}", 0) for number in range(57)),
        "test_sets": ({"dataset": "tickets", "metrics": ["f1"], "limit": 50},),
        "chat_template": "1" * 64,
    }
    base = write_evaluation(tmp_path / "base", {"quiz": BASE}, **mine)
    candidate = write_evaluation(tmp_path / "new", {"quiz": BASE}, **{**mine, **other})
    with pytest.raises(DataError, match=message) as told:
        gate(base, candidate)
    assert len(str(told.value).splitlines()) <= 5


# Bounds of single tasks, and what must improve


def test_a_bound_of_its_own_is_what_a_task_is_held_to(compare):
    slightly_worse = flipped(BASE, 20, 0.0)
    scores = {"quiz": BASE, "other": BASE}, {"quiz": slightly_worse, "other": BETTER}
    _, strict = compare(*scores)
    assert strict.checks[0].verdict == "fail"
    _, lenient = compare(*scores, max_drops={"quiz": 0.2})
    assert [check.max_drop for check in lenient.checks] == [0.2, 0.02]
    assert lenient.verdict == "pass"
    assert "a drop beyond 0.2 is ruled out" in lenient.checks[0].sentence


@pytest.mark.parametrize(
    ("candidate", "expected", "words"),
    [
        (BETTER, "pass", "an improvement is shown (would have seen a gain of 0."),
        (WORSE, "fail", "a drop is shown"),
        (flipped(flipped(BASE, 20, 0.0), 24, 1.0), "not enough evidence", "is not shown; about "),
    ],
)
def test_what_must_improve_is_shown_better_or_does_not_pass(compare, candidate, expected, words):
    _, verdict = compare({"quiz": BASE}, {"quiz": candidate}, must_improve=("quiz",))
    [check] = verdict.checks
    assert (check.requirement, check.max_drop) == ("must_improve", 0.0)
    assert verdict.verdict == check.verdict == expected
    assert words in check.sentence


def test_no_worse_is_not_better(compare):
    same = flipped(flipped(BASE, 2, 0.0), 2, 1.0)
    assert compare({"quiz": BASE}, {"quiz": same})[1].verdict == "pass"
    _, verdict = compare({"quiz": BASE}, {"quiz": same}, must_improve=("quiz",))
    assert verdict.verdict == "not enough evidence"
    assert "more items would hardly settle it" in verdict.checks[0].sentence


@pytest.mark.parametrize("settings", [{"max_drops": {"quizz": 0.1}}, {"must_improve": ("quizz",)}])
def test_a_task_that_was_not_evaluated_is_told_with_those_that_were(compare, settings):
    message = (
        rf"gate\.{next(iter(settings))}: no task `quizz` .*did you mean `quiz`\?; there are `quiz`"
    )
    with pytest.raises(DataError, match=message):
        compare({"quiz": BASE, "other": BASE}, {"quiz": BASE, "other": BASE}, **settings)
    with pytest.raises(DataError, match="the evaluation has no tasks"):
        compare({}, {}, (NATS, NATS), **settings)


# Further datasets, and other tokenizers


@pytest.mark.parametrize("perplexity", ["must_improve", "must_not_rise"])
def test_other_datasets_must_not_get_worse(gate, tmp_path, perplexity):
    base = write_evaluation(tmp_path / "base", {}, NATS, others={"general": NATS, "code": NATS})
    new = write_evaluation(tmp_path / "new", {}, LESS, others={"general": MORE, "code": NATS})
    result, verdict = gate(base, new, perplexity=perplexity)
    assert verdict.verdict == "fail"
    assert verdict.perplexity is not None
    assert verdict.perplexity.verdict == "pass"
    assert [one.dataset for one in verdict.other_perplexities] == ["general", "code"]
    assert {one.requirement for one in verdict.other_perplexities} == {"must_not_rise"}
    assert [one.verdict for one in verdict.other_perplexities] == ["fail", "pass"]
    [reason] = verdict.reasons
    assert reason.startswith("perplexity of general: 26.8 -> ")
    assert "perplexity of code 26.8 -> 26.8" in result.headline
    assert result.metrics["difference_nats_per_token_code"] == 0.0


def test_without_a_main_dataset_the_others_are_enough(gate, tmp_path):
    base = write_evaluation(tmp_path / "base", {}, others={"general": NATS})
    new = write_evaluation(tmp_path / "new", {}, others={"general": LESS})
    _, verdict = gate(base, new)
    assert verdict.verdict == "pass"
    assert verdict.perplexity is None


@pytest.mark.parametrize(("candidate", "expected"), [(LESS, "pass"), (MORE, "fail")])
def test_other_tokens_of_the_same_text_are_compared_by_byte(gate, tmp_path, candidate, expected):
    base = write_evaluation(tmp_path / "base", {}, NATS, tokens=10)
    new = write_evaluation(tmp_path / "new", {}, candidate, tokens=14)
    result, verdict = gate(base, new)
    check = verdict.perplexity
    assert check is not None
    assert (verdict.verdict, check.unit) == (expected, "byte")
    assert check.difference == pytest.approx(check.base - check.candidate)
    assert check.base == pytest.approx(np.mean(NATS) / 30 / math.log(2))
    assert " bits a byte on 40 rows" in check.sentence
    assert "difference_bits_per_byte" in result.metrics


def test_a_rise_by_byte_is_held_to_the_same_percent_as_by_token(gate, tmp_path):
    base = write_evaluation(tmp_path / "base", {}, NATS)
    # 0.009 and 0.011 nats for each of the base's ten tokens of a row.
    for name, more, expected in (("little", 0.09, "pass"), ("much", 0.11, "fail")):
        nats = [value + more for value in NATS]
        for tokens in (10, 14):
            new = write_evaluation(tmp_path / f"{name}-{tokens}", {}, nats, tokens=tokens)
            assert gate(base, new)[1].verdict == expected, (name, tokens)


def test_open_perplexity_says_how_many_rows_would_settle_it(compare):
    noisy = [value + (3 if number % 2 else -3) for number, value in enumerate(NATS)]
    _, verdict = compare({}, {}, (NATS, noisy))
    check = verdict.perplexity
    assert check is not None
    assert check.verdict == "not enough evidence"
    assert check.rows_needed is not None
    assert check.rows_needed > 40
    assert f"about {check.rows_needed:,} rows would settle it" in check.sentence
    assert "(would have seen a rise of " in check.sentence


# The output


def test_what_it_could_have_seen_stands_in_every_sentence_that_shows_no_drop(compare):
    few = drawn(0.5, 60)
    _, verdict = compare({"many": BASE, "few": few}, {"many": BETTER, "few": few}, (NATS, LESS))
    passed, still_open = verdict.checks
    for check in (passed, still_open):
        assert f"(would have seen a drop of {check.smallest_detectable_drop:.3f})" in check.sentence
    assert verdict.perplexity is not None
    assert (
        "a rise beyond 1% is ruled out (would have seen a rise of " in verdict.perplexity.sentence
    )


def test_the_page_says_what_was_asked_of_each_task(compare, tmp_path):
    compare(
        {"quiz": BASE, "other": BASE},
        {"quiz": BETTER, "other": BETTER},
        (NATS, LESS),
        must_improve=("quiz",),
        max_drops={"other": 0.05},
    )
    [page] = tmp_path.glob("gate-*/output/verdict.md")
    lines = page.read_text().splitlines()
    assert any(line.startswith("| quiz | acc | better | 0.") for line in lines)
    assert any(line.startswith("| other | acc | no drop beyond 0.05 | 0.") for line in lines)
    assert any(
        line.startswith("| perplexity | no rise beyond 1% | 26.8 | 14.0 |") for line in lines
    )


def test_equal_evaluations_give_equal_bytes(compare, tmp_path):
    for _ in range(2):
        compare({"quiz": BASE}, {"quiz": BETTER}, (NATS, LESS))
    first, second = sorted(tmp_path.glob("gate-*/output"))
    names = sorted(path.name for path in first.iterdir())
    assert names == ["report.html", "verdict.json", "verdict.md"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_all_of_mmlu_takes_seconds(gate, tmp_path):
    rng = np.random.default_rng(0)
    base = (rng.random(14_042) < 0.5).astype(float)
    new = np.where(rng.random(14_042) < 0.1, 1 - base, base)
    folders = [
        write_evaluation(tmp_path / name, {"mmlu": values}, groups=57)
        for name, values in (("base", base), ("new", new))
    ]
    began = time.process_time()
    _, verdict = gate(*folders)
    judge(*folders, GateConfig(bootstrap_samples=10_000))
    assert time.process_time() - began < 15
    assert verdict.checks[0].n == 14_042


def test_the_gate_starts_without_the_training_libraries():
    code = (
        "import sys, posttrain.stages.gate; "
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
