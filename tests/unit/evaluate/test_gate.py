from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
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
    Verdict,
)
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
) -> Path:
    """An evaluation as the evaluate stage writes it."""
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
    rows = [PerplexityRow(str(i), float(n), tokens, 30) for i, n in enumerate(nats)]
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
    settings = Settings(
        lm_eval="0",
        tasks=(),
        limit=None,
        seed=seed,
        dtype="float32",
        questions_in_chat_template=False,
        chat_template=None,
        perplexity_rows=200,
        perplexity_max_length=1024,
    )
    EvaluationResults(
        tasks=tuple(tasks),
        perplexity=perplexity(nats, tokens) if len(nats) else None,
        settings=settings,
        settings_digest=settings.digest,
    ).save(folder)
    return folder


def perplexity(nats: Sequence[float], tokens: int) -> PerplexityResult:
    mean = float(np.mean(nats)) / tokens
    return PerplexityResult(
        perplexity=float(np.exp(mean)),
        nats_per_token=mean,
        bits_per_byte=1.0,
        rows=len(nats),
        tokens=tokens * len(nats),
        bytes=30 * len(nats),
    )


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
        (NATS, {"tokens": 11}, "different tokens"),
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


def test_the_gate_starts_without_the_training_libraries():
    code = (
        "import sys, posttrain.stages.gate; "
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
