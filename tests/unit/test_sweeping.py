"""Sweeps without training: what is tried, what is given up, what is chosen, how it is shown."""

from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from posttrain.errors import RecipeError, StoreError, UsageError
from posttrain.evaluate.results import Check, PerplexityCheck, Verdict
from posttrain.events import Progress, Values, Warn
from posttrain.pipeline import BoundStep
from posttrain.store import Store
from posttrain.sweeping.board import board
from posttrain.sweeping.choice import (
    choose,
    rows_standard_error,
    seeds_standard_error,
    with_comparisons,
)
from posttrain.sweeping.gating import improvement
from posttrain.sweeping.page import page_html, table_markdown
from posttrain.sweeping.plan import SweepPlan, SweepRequest, plan_sweep
from posttrain.sweeping.record import (
    Choice,
    Loss,
    SweepRecord,
    Trial,
    TrialRun,
    read_record,
)
from posttrain.sweeping.run import Proposal, new_record
from posttrain.sweeping.space import Choices, Range, label, parse_space, show_value
from posttrain.sweeping.study import hopeless, propose

RANK = "sft.adapter.rank"
RATE = "sft.optimization.learning_rate"


def trial(
    number: int,
    value: float | None,
    *,
    key: str = RANK,
    at: Any = None,
    seeds: Sequence[float] = (),
    folders: Sequence[Path] = (),
    losses: Sequence[float] = (),
    status: Any = None,
    **changes: Any,
) -> Trial:
    """A trial on record. Losses stand at 0, 20, 40, ... percent of the run."""
    status = status or ("complete" if value is not None else "pruned")
    curve = [Loss(step=n * 2, loss=loss, percent=n * 20) for n, loss in enumerate(losses)]
    paths = [str(folder) for folder in folders] or [None]
    run = TrialRun(seed=None, overrides=(), status=status, value=value, losses=tuple(curve))
    runs = [
        run.model_copy(update={"artifact": path, "value": seed})
        for path, seed in zip(paths, seeds or [value] * len(paths), strict=True)
    ]
    at = at if at is not None else 2 ** (number + 2)
    made = Trial(number=number, values={key: at}, status=status, value=value, runs=tuple(runs))
    return made.model_copy(update=changes)


# What is tried


def test_lists_and_ranges_are_read_as_the_recipe_would_read_them() -> None:
    space = parse_space([f"{RANK}=4,8", f"{RATE}=1e-5..1e-3", "sft.adapter.dora=true,false"])
    rank, rate, dora = space.axes
    assert rank == Choices(RANK, (4, 8))
    assert isinstance(rate, Range)
    assert (rate.low, rate.high, rate.log, rate.whole) == (1e-5, 1e-3, True, False)
    assert dora == Choices("sft.adapter.dora", (True, False))


def test_a_narrow_range_and_one_through_zero_are_drawn_evenly() -> None:
    [rank] = parse_space(["sft.adapter.rank=4..32"]).axes
    [decay] = parse_space(["sft.optimization.weight_decay=0..0.1"]).axes
    assert isinstance(rank, Range)
    assert isinstance(decay, Range)
    assert (rank.whole, rank.log, decay.whole, decay.log) == (True, False, False, False)


def test_commas_inside_brackets_do_not_split_a_list() -> None:
    [axis] = parse_space(["sft.adapter={type: lora, rank: 4},null"]).axes
    assert axis == Choices("sft.adapter", ({"type": "lora", "rank": 4}, None))


def test_a_grid_has_every_combination_once() -> None:
    points = parse_space(["a=1,2,2", "b=x,y"]).grid()
    assert [label(point) for point in points] == ["a=1, b=x", "a=1, b=y", "a=2, b=x", "a=2, b=y"]


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ([], "a sweep needs a key and its values"),
        (["sft.adapter.rank"], "write KEY=A,B,C"),
        (["sft.adapter.rank=4"], "one value is no sweep"),
        (["a=1,2", "a=3,4"], "given twice"),
        (["a=2..1"], "the first end of a range must be below the second"),
        (["a=[1,2"], "not valid YAML"),
    ],
)
def test_what_is_no_sweep_is_refused(texts: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(complaint)):
        parse_space(texts)


PRINTABLE = st.characters(exclude_categories=["C", "Zl", "Zp"], include_characters="\n")


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.text(PRINTABLE, max_size=8),
                 st.floats(allow_nan=False, allow_infinity=False)))  # fmt: skip
def test_a_value_that_is_shown_is_read_back_as_itself(value: Any) -> None:
    [axis] = parse_space([f"a={show_value(value)},[something else]"]).axes
    assert isinstance(axis, Choices)
    assert axis.values[0] == value
    assert type(axis.values[0]) is type(value)


def test_keys_are_shortened_as_far_as_they_stay_apart() -> None:
    assert label({"sft.adapter.rank": 8, "dpo.adapter.rank": 4, "sft.epochs": 2}) == (
        "sft.adapter.rank=8, dpo.adapter.rank=4, epochs=2"
    )


# What stages the keys reach

Plan = Callable[..., SweepPlan]


@pytest.fixture
def plan(tmp_path: Path, tiny_model: Path) -> Plan:
    """Plans a sweep over a recipe that pretrains all weights and fine-tunes an adapter."""
    chat = {"prompt": "Hi?", "completion": "Hello there."}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 4)
    (tmp_path / "texts.jsonl").write_text((json.dumps({"text": "Some text."}) + "\n") * 4)
    recipe = {
        "name": "test",
        "model": str(tiny_model),
        "datasets": {
            "chats": {"source": str(tmp_path / "chats.jsonl")},
            "texts": {"source": str(tmp_path / "texts.jsonl"), "format": "text"},
        },
        "stages": [
            {"pretrain": {"dataset": "texts"}},
            {"sft": {"dataset": "chats", "adapter": {"rank": 16}}},
            "merge",
            "evaluate",
            {"gate": {"max_drop": 0.1}},
        ],
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))

    def make(*over: str, **options: Any) -> SweepPlan:
        request = SweepRequest(file, over, tuple(options.pop("overrides", ())), **options)
        return plan_sweep(request, Store(tmp_path / "store"))

    return make


def own_steps(plan: SweepPlan) -> list[str]:
    return [step.name for step in plan.own_steps(plan.pipeline)]


def test_what_comes_before_the_swept_stage_is_shared(plan: Plan) -> None:
    made = plan(f"{RANK}=4,8")
    assert made.objective.name == "sft.held_out_loss"
    assert "pretrain" in made.shared
    assert own_steps(made) == ["sft"]


def test_a_trial_ends_with_the_stage_whose_settings_are_swept(plan: Plan) -> None:
    made = plan("pretrain.epochs=1,2")
    assert made.objective.name == "pretrain.held_out_loss"
    assert "sft" not in [step.name for step in made.pipeline.steps]


def test_what_is_swept_before_all_training_is_judged_by_the_first_training_after_it(
    plan: Plan,
) -> None:
    assert plan("datasets.chats.limit=3,4").objective.name == "sft.held_out_loss"


def test_a_named_metric_takes_the_trials_as_far_as_its_stage(plan: Plan) -> None:
    made = plan(f"{RANK}=4,8", metric="merge.max_logit_difference", maximize=False)
    assert own_steps(made) == ["sft", "merge"]
    assert made.objective.gate is None


def test_where_a_gate_decides_on_the_metric_the_trials_have_to_pass_it(plan: Plan) -> None:
    made = plan(f"{RANK}=4,8", metric="evaluate.perplexity")
    assert (made.objective.name, made.objective.gate) == ("evaluate.perplexity", "gate")
    assert own_steps(made) == ["sft", "merge", "evaluate", "gate"]


def test_the_weight_of_an_interpolation_is_swept_by_the_gate_and_nothing_is_trained_twice(
    plan: Plan,
) -> None:
    overrides = ["merge.method=interpolate"]
    made = plan("merge.weight=0.3,0.7,1.0", overrides=overrides)
    assert (made.objective.name, made.objective.maximize) == ("gate.improvement", True)
    assert {"pretrain", "sft", "evaluate-base"} <= set(made.shared)
    assert own_steps(made) == ["merge", "evaluate", "gate"]
    named = plan("merge.weight=0.3,0.7,1.0", overrides=overrides, metric="gate")
    assert named.digest == made.digest


def test_seeds_are_those_of_the_stages_that_are_not_shared(plan: Plan) -> None:
    made = plan(f"{RANK}=4,8", seeds=2, overrides=["sft.seed=5"])
    assert made.overrides_of({RANK: 4}, 1) == (f"{RANK}=4", "stages[1].sft.seed=6")
    store = Store(made.request.file.parent / "store")
    seeds = [made.open_trial({RANK: 4}, seed, store).recipe.stages[1].seed for seed in (0, 1)]  # type: ignore[attr-defined]
    assert seeds == [5, 6]


def test_the_same_question_gets_the_same_folder_and_another_one_its_own(plan: Plan) -> None:
    first, again, other = plan(f"{RANK}=4,8"), plan(f"{RANK}=4,8"), plan(f"{RANK}=4,16")
    data = plan(f"{RANK}=4,8", overrides=["datasets.chats.limit=3"])
    gate = plan(f"{RANK}=4,8", overrides=["gate.max_drop=0.3"])
    assert first.digest == again.digest == gate.digest
    assert len({first.digest, other.digest, data.digest}) == 3


@pytest.mark.parametrize(
    ("over", "options", "complaint"),
    [
        ("sft.adaptor.rank=4,8", {}, "there is no such key"),
        ("dpo.beta=1,2", {}, "--over dpo.beta: no key or stage `dpo`"),
        ("sft.launch.num_processes=1,2", {"metric": "sft.held_out_loss"},
         "--over sft.launch.num_processes: changes nothing that sft.held_out_loss depends on; it "
         "changes no result"),
        ("gate.max_drop=0.1,0.2", {}, "no training stage depends on the swept keys"),
        ("gate.max_drop=0.1,0.2", {"metric": "sft.held_out_loss"}, "it changes gate"),
        (f"{RANK}=4,8", {"metric": "held_out_loss"}, "write STAGE.METRIC"),
        (f"{RANK}=4,8", {"maximize": True}, "--metric"),
        (f"{RANK}=4,8", {"trials": 3}, "tried in full"),
        (f"{RANK}=4,0", {}, "greater than or equal to 1"),
        ("gate.max_drop=0.1,0.2", {"metric": "gate.passed", "seeds": 2}, "has a seed"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_first_trial(
    plan: Plan, over: str, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises((UsageError, RecipeError), match=re.escape(complaint)):
        plan(over, **options)


# By the gate


def verdict(outcome: Any, **changes: Any) -> Verdict:
    empty = {"reasons": (), "checks": (), "perplexity": None, "max_drop": 0.02, "confidence": 0.95}
    return Verdict(verdict=outcome, **{**empty, **changes})


def check(task: str, difference: float, requirement: Any = "must_not_drop") -> Check:
    return Check(
        task=task,
        metric="acc",
        base=0.5,
        candidate=0.5 + difference,
        difference=difference,
        low=difference - 0.01,
        high=difference + 0.01,
        n=100,
        p_worse=0.5,
        mcnemar_p=None,
        smallest_detectable_drop=0.02,
        items_needed=None,
        verdict="pass",
        sentence=task,
        requirement=requirement,
    )


PERPLEXITY = PerplexityCheck(
    requirement="must_improve",
    base=12.0,
    candidate=9.0,
    difference=0.29,
    low=0.2,
    high=0.4,
    rows=24,
    p_worse=0.0,
    verdict="pass",
    sentence="perplexity",
)


@pytest.mark.parametrize(
    ("found", "value", "what"),
    [
        (verdict("pass", checks=(check("mmlu", 0.1), check("mine", 0.3, "must_improve")),
                 perplexity=PERPLEXITY), 0.3, "mean gain on mine"),
        (verdict("fail", checks=(check("mmlu", 0.1),), perplexity=PERPLEXITY), 0.29,
         "nats a token saved on held-out rows"),
        (verdict("pass", checks=(check("mmlu", 0.1), check("arc", 0.2))), 0.15,
         "mean gain on mmlu, arc"),
    ],
)  # fmt: skip
def test_an_improvement_is_what_had_to_improve_else_perplexity_else_all_tasks(
    found: Verdict, value: float, what: str
) -> None:
    assert improvement(found).value == pytest.approx(value)
    assert improvement(found).what == what


def test_the_largest_improvement_is_chosen_among_those_that_pass_the_gate() -> None:
    outcomes = ("pass", "pass", "not enough evidence", "fail")
    trials = [gated(number, 0.1 * (number + 1), outcome) for number, outcome in enumerate(outcomes)]
    compared = with_comparisons(trials, maximize=True, rows=False)
    pick = choose(compared, maximize=True)
    assert pick is not None
    assert (pick.number, pick.best) == (1, 1)
    assert pick.reason.startswith("the best of the 2 that pass the gate")
    assert [one.difference for one in compared[2:]] == [None, None]


def gated(number: int, value: float, outcome: Any) -> Trial:
    made = trial(number, value, key="merge.weight", at=0.2 * (number + 1))
    runs = tuple(run.model_copy(update={"verdict": outcome}) for run in made.runs)
    return made.model_copy(update={"runs": runs})


def test_where_nothing_passes_nothing_is_chosen_and_every_page_says_so() -> None:
    trials = [gated(0, 0.3, "fail"), gated(1, 0.4, "not enough evidence")]
    compared = with_comparisons(trials, maximize=True, rows=False)
    assert choose(compared, maximize=True) is None
    made = record(compared, keys=["merge.weight"])
    made = made.model_copy(update={"choice": None, "gate": "gate", "maximize": True})
    for text in (page_html(made), table_markdown(made)):
        assert "None of the trials passes the gate." in text
        assert "gate: fail" in text
        assert "gate: not enough evidence" in text
        assert "2 not passed by the gate" in text


def test_no_draw_goes_back_to_where_the_gate_said_no() -> None:
    space = parse_space(["merge.weight=0.0..1.0"])
    trials: list[Trial] = []
    for number in range(40):
        values = propose(space, trials, maximize=True)
        weight = float(str(values["merge.weight"]))
        made = gated(number, weight, "pass" if weight < 0.6 else "fail")
        trials.append(made.model_copy(update={"values": dict(values)}))
    late = [float(str(one.values["merge.weight"])) for one in trials[20:]]
    assert sum(weight < 0.6 for weight in late) > 0.6 * len(late)


# What is drawn and given up


def drawn(count: int) -> list[Trial]:
    space = parse_space([f"{RATE}=1e-5..1e-2", "sft.epochs=1..3", "sft.adapter.rank=4,8"])
    trials: list[Trial] = []
    for number in range(count):
        values = propose(space, trials, maximize=False)
        loss = abs(math.log10(float(str(values[RATE]))) + 3)
        trials.append(trial(number, loss).model_copy(update={"values": dict(values)}))
    return trials


def test_draws_are_repeatable_and_go_on_as_if_never_stopped() -> None:
    whole = drawn(14)
    assert [t.values for t in whole] == [t.values for t in drawn(14)]
    space = parse_space([f"{RATE}=1e-5..1e-2", "sft.epochs=1..3", "sft.adapter.rank=4,8"])
    on_disk = [Trial.model_validate_json(t.model_dump_json()) for t in whole[:12]]
    assert propose(space, on_disk, maximize=False) == whole[12].values


def test_draws_stay_in_their_ranges_and_come_to_the_point() -> None:
    trials = drawn(30)
    rates = [float(str(t.values[RATE])) for t in trials]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert {t.values["sft.epochs"] for t in trials} <= {1, 2, 3}
    assert {t.values["sft.adapter.rank"] for t in trials} == {4, 8}
    late = [t.value for t in trials[20:] if t.value is not None]
    early = [t.value for t in trials[:10] if t.value is not None]
    assert float(np.median(late)) < float(np.median(early)) / 2


GOOD = [trial(0, 2.0, losses=[4.0, 3.0, 2.5, 2.2, 2.1, 2.0]),
        trial(1, 2.1, losses=[4.0, 3.1, 2.6, 2.3, 2.2, 2.1])]  # fmt: skip


def curve(*losses: float) -> tuple[Loss, ...]:
    return trial(9, None, losses=losses).losses


def test_a_trial_that_hardly_learns_is_given_up() -> None:
    reason = hopeless(curve(4.0, 3.9, 3.8), GOOD)
    assert reason == "held-out loss 3.800 after 40% of the run, where the best trial had 2.500"


def test_a_trial_a_little_below_the_median_goes_on() -> None:
    assert hopeless(curve(4.0, 3.15, 2.64), GOOD) is None


@pytest.mark.parametrize(
    ("losses", "others"),
    [
        ([4.0, 3.9], GOOD),  # its first quarter
        ([4.0, 3.9, 3.8], GOOD[:1]),  # nothing to compare with
        ([4.0, 3.9, 3.8, 3.7, 3.6, 3.5], GOOD),  # at its end
        ([4.0, 3.9, 3.8], [GOOD[0], trial(1, None, losses=[4.0, 3.0, 2.5])]),
    ],
)
def test_no_trial_is_given_up_too_early_or_too_late(
    losses: list[float], others: list[Trial]
) -> None:
    assert hopeless(curve(*losses), others) is None


# What is chosen


def held_out(folder: Path, nll: Sequence[float], tokens: Sequence[int] = (2, 2)) -> Path:
    """An artifact's folder with the losses of its held-out rows."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        "id": [f"row-{n}" for n in range(len(nll))],
        "task": ["chats"] * len(nll),
        "tokens": pa.array(tokens, pa.int64()),
        "nll": pa.array(nll, pa.float64()),
    }
    pq.write_table(pa.table(table), folder / "held_out.parquet")
    return folder


def test_the_standard_error_over_rows_by_hand() -> None:
    # D = 1/4; residuals 1 - 2/4 and 0 - 2/4; sqrt(2/1 * (0.25 + 0.25)) / 4
    assert rows_standard_error(np.array([1.0, 0.0]), np.array([2.0, 2.0])) == pytest.approx(0.25)
    # D = 3/6; residuals 2 - 2, 1 - 0.5, 0 - 0.5; sqrt(3/2 * 0.5) / 6
    three = rows_standard_error(np.array([2.0, 1.0, 0.0]), np.array([4.0, 1.0, 1.0]))
    assert three == pytest.approx(math.sqrt(0.75) / 6)
    assert rows_standard_error(np.array([1.0]), np.array([2.0])) is None


def test_the_standard_error_over_rows_is_that_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, 400).astype(float)
    difference = rng.normal(0.05, 0.4, 400) * tokens**0.5
    drawn = rng.integers(0, 400, (4000, 400))
    resampled = difference[drawn].sum(1) / tokens[drawn].sum(1)
    assert rows_standard_error(difference, tokens) == pytest.approx(resampled.std(), rel=0.05)


def test_the_standard_error_over_seeds_by_hand() -> None:
    # differences 0.1 and 0.3: s = 0.1 * sqrt(2), over sqrt(2)
    assert seeds_standard_error([2.1, 2.3], [2.0, 2.0]) == pytest.approx(0.1)
    assert seeds_standard_error([2.1], [2.0]) is None


def test_rows_and_seeds_both_add_to_the_error(tmp_path: Path) -> None:
    best = [held_out(tmp_path / f"best{n}", [4.0, 4.0]) for n in range(2)]
    other = [held_out(tmp_path / f"other{n}", [5.0, 4.0]) for n in range(2)]
    trials = [
        trial(0, 2.2, seeds=[2.1, 2.3], folders=other),
        trial(1, 2.0, seeds=[2.0, 2.0], folders=best),
    ]
    worse, same = with_comparisons(trials, False, rows=True)
    assert worse.difference == pytest.approx(0.2)
    assert worse.standard_error == pytest.approx(math.hypot(0.25, 0.1))
    assert (same.difference, same.standard_error) == (0.0, 0.0)


def test_the_smallest_rank_within_one_standard_error_is_chosen(tmp_path: Path) -> None:
    nll = {0: [7.0, 7.0], 1: [5.0, 4.0], 2: [4.1, 4.0], 3: [4.0, 4.0]}
    trials = [
        trial(n, sum(rows) / 4, folders=[held_out(tmp_path / str(n), rows)])
        for n, rows in nll.items()
    ]
    compared = with_comparisons(trials, False, rows=True)
    assert [t.difference for t in compared] == pytest.approx([1.5, 0.25, 0.025, 0.0])
    assert [t.standard_error for t in compared] == pytest.approx([0.0, 0.25, 0.025, 0.0])
    pick = choose(compared, False)
    assert pick is not None
    assert (pick.number, pick.best, pick.rule) == (1, 3, "one standard error")
    assert pick.reason == (
        "the smallest rank within one standard error of the best (rank=32): 0.2500 worse, standard "
        "error 0.2500"
    )


def test_rows_are_paired_by_their_ids_whatever_their_order(tmp_path: Path) -> None:
    best, other = held_out(tmp_path / "a", [4.0, 9.0]), held_out(tmp_path / "b", [5.0, 9.0])
    table = pq.read_table(other / "held_out.parquet")
    pq.write_table(table.take([1, 0]), other / "held_out.parquet")
    trials = [trial(0, 3.5, folders=[other]), trial(1, 3.25, folders=[best])]
    assert with_comparisons(trials, False, rows=True)[0].standard_error == pytest.approx(0.25)


def test_without_held_out_rows_the_best_is_chosen_and_the_reason_says_so() -> None:
    pick = choose(with_comparisons([trial(0, 2.1), trial(1, 2.0)], False, rows=True), False)
    assert pick is not None
    assert (pick.number, pick.rule) == (1, "best")
    assert "cannot be applied" in pick.reason


def test_other_tokens_cannot_be_paired(tmp_path: Path) -> None:
    folders = [held_out(tmp_path / "a", [4.0, 4.0]), held_out(tmp_path / "b", [4.0, 4.1], (2, 3))]
    trials = [trial(n, 2.0 - n / 10, folders=[folder]) for n, folder in enumerate(folders)]
    assert with_comparisons(trials, False, rows=True)[0].standard_error is None


@pytest.mark.parametrize(("key", "values"), [(RATE, (1e-4, 1e-3)), ("sft.adapter.type", "ab")])
def test_where_no_end_is_simpler_the_best_is_chosen(key: str, values: Sequence[Any]) -> None:
    trials = [
        trial(n, 2.0 - n / 1000, key=key, at=at, difference=(1 - n) / 1000, standard_error=1.0)
        for n, at in enumerate(values)
    ]
    pick = choose(trials, False)
    assert pick is not None
    assert (pick.number, pick.rule) == (1, "best")
    assert "does not apply" in pick.reason


def test_with_two_keys_the_smallest_rank_comes_with_its_best_rate() -> None:
    made = [
        trial(0, 2.3, values={RANK: 4, RATE: 0.1}, difference=0.3, standard_error=0.1),
        trial(1, 2.05, values={RANK: 8, RATE: 0.1}, difference=0.05, standard_error=0.1),
        trial(2, 2.02, values={RANK: 8, RATE: 0.2}, difference=0.02, standard_error=0.1),
        trial(3, 2.0, values={RANK: 16, RATE: 0.1}, difference=0.0, standard_error=0.0),
    ]
    pick = choose(made, False)
    assert pick is not None
    assert pick.number == 2


def test_a_smaller_rank_is_not_bought_with_more_epochs() -> None:
    made = [
        trial(0, 2.05, values={RANK: 4, "sft.epochs": 3}, difference=0.05, standard_error=0.1),
        trial(1, 2.0, values={RANK: 8, "sft.epochs": 1}, difference=0.0, standard_error=0.0),
    ]
    pick = choose(made, False)
    assert pick is not None
    assert (pick.number, pick.reason) == (
        1,
        "the best; no smaller rank and epochs is within one standard error of it",
    )


def test_pruned_and_failed_trials_are_never_chosen() -> None:
    trials = [trial(0, None), trial(1, None, status="failed"), trial(2, 3.0), trial(3, 2.9)]
    pick = choose(with_comparisons(trials, False, rows=True), False)
    assert pick is not None
    assert pick.number == 3
    assert choose(trials[:2], False) is None


def test_more_may_be_better() -> None:
    compared = with_comparisons([trial(0, 0.5), trial(1, 0.7)], True, rows=False)
    assert [t.difference for t in compared] == pytest.approx([0.2, 0.0])


@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 2, 4, 8, 16, 32]),
            st.one_of(st.none(), st.floats(0.5, 5)),
            st.one_of(st.none(), st.floats(0, 1)),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_the_choice_is_never_worse_than_one_error_and_never_larger_than_the_best(
    rows: list[tuple[int, float | None, float | None]],
) -> None:
    values = [value for _, value, _ in rows if value is not None]
    trials = [
        trial(
            number,
            value,
            at=rank,
            difference=None if value is None else value - min(values),
            standard_error=0.0 if value == min(values, default=None) else error,
        )
        for number, (rank, value, error) in enumerate(rows)
    ]
    pick = choose(trials, False)
    if not values:
        assert pick is None
        return
    assert pick is not None
    chosen, best = trials[pick.number], trials[pick.best]
    assert best.value == min(values)
    assert chosen.difference is not None
    assert chosen.difference <= (chosen.standard_error or 0.0)
    assert int(str(chosen.values[RANK])) <= int(str(best.values[RANK]))


# How it is kept and shown


def record(trials: Sequence[Trial], keys: Sequence[str] = (RANK,)) -> SweepRecord:
    choice = Choice(
        number=0,
        values=trials[0].values,
        best=1,
        rule="one standard error",
        reason="the smallest <rank>",
        command="posttrain run recipe.yaml --set sft.adapter.rank=4",
    )
    return SweepRecord(
        recipe="r&d",
        file="recipe.yaml",
        over=(f"{RANK}=4,8",),
        keys=tuple(keys),
        objective="sft.held_out_loss",
        planned=4,
        shared=("prepare",),
        trials=tuple(trials),
        choice=choice,
    )


SHOWN = [
    trial(0, 2.1, losses=[4.0, 3.0, 2.1], difference=0.1, standard_error=0.2),
    trial(1, 2.0, losses=[4.0, 2.9, 2.0], difference=0.0, standard_error=0.0),
    trial(2, None, losses=[4.0, 3.9]),
    trial(3, None, status="failed"),
]


def test_a_record_is_read_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    record(SHOWN).write(tmp_path)
    assert read_record(tmp_path) == record(SHOWN)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(StoreError, match=re.escape("remove it to begin anew")):
        read_record(tmp_path)


def test_the_page_needs_nothing_else_and_escapes_what_it_shows() -> None:
    page = page_html(record(SHOWN))
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "the smallest &lt;rank&gt;" in page
    assert "r&amp;d" in page
    assert "posttrain run recipe.yaml --set sft.adapter.rank=4" in page


def test_the_plots_are_well_formed_and_have_every_trial() -> None:
    by_key, by_step = re.findall(r"<svg class=\"plot\".*?</svg>", page_html(record(SHOWN)), re.S)
    groups = [*ET.fromstring(by_key).iter("g"), *ET.fromstring(by_step).iter("g")]
    titles = [group.findtext("title") or "" for group in groups]
    assert sum("rank=4:" in title for title in titles) == 2
    assert sum("rank=16:" in title for title in titles) == 2
    assert any("standard error 0.2000" in title for title in titles)
    assert "pruned" in by_key
    assert "failed" in by_key


@pytest.mark.parametrize(
    "values",
    [[4, 8, 16, 32], [0.1], [5, 5.0], ["lora", "ia3"], [None, {"type": "lora"}], [0, -3],
     [10.0**-n for n in range(12)], list(range(20))],
)  # fmt: skip
def test_any_values_can_be_plotted(values: list[Any]) -> None:
    made = [trial(n, 2.0, at=at) for n, at in enumerate(values)]
    made = [t.model_copy(update={"values": {RANK: at}}) for t, at in zip(made, values, strict=True)]
    page = page_html(record([*made, trial(99, None, at=values[0])]))
    for number in re.findall(r"\s(?:cx|x1|y1|x|y)=\"([^\"]+)\"", page):
        assert math.isfinite(float(number))


def test_markdown_has_a_line_a_trial_and_the_command() -> None:
    text = table_markdown(record(SHOWN))
    assert "| chosen | 4 | 2.1000 | 0.1000 | 0.2000 |" in text
    assert "| best | 8 | 2.0000 |" in text
    assert "pruned" in text
    assert "posttrain run recipe.yaml --set sft.adapter.rank=4" in text


def shown(*, terminal: bool, plan: Plan) -> str:
    """What a terminal, or a file, gets of a sweep with one trial and the start of a second."""
    out = io.StringIO()
    console = Console(file=out, width=110, force_terminal=terminal, highlight=False)
    made = plan(f"{RANK}=4,8")
    watch = board(console, made)
    step = next(step for step in made.pipeline.steps if step.name == "sft")
    bound = BoundStep(step, "test", "0" * 64, {}, {}, {})
    watch.sweep_opened(new_record(made))
    watch.trial_started(Proposal(0, {RANK: 4}))
    watch.started(bound)
    watch.event(bound, Progress(time=0, done=3, total=6, values={"loss": 2.5}))
    watch.event(bound, Values(time=0, step=3, values={"eval_loss": 2.25}))
    watch.event(bound, Warn(time=0, message="something odd"))
    first = trial(0, 2.1)
    watch.trial_finished(first, record([first]).model_copy(update={"choice": None}))
    watch.trial_started(Proposal(1, {RANK: 8}))
    watch.event(bound, Progress(time=0, done=4, total=6, values={"loss": 2.4}))
    watch.event(bound, Values(time=0, step=4, values={"eval_loss": 2.15}))
    watch.close()
    return out.getvalue()


def test_lines_say_how_the_trials_go(plan: Plan) -> None:
    text = shown(terminal=False, plan=plan)
    assert "trial 1 of 2: rank=4\n" in text
    assert "sft: step 3/6, loss 2.500" in text
    assert "sft: held-out loss 2.2500 at step 3" in text
    assert "sft: warning: something odd" in text
    assert "sft.held_out_loss 2.1000, complete" in text


def test_a_terminal_has_a_table_that_moves(plan: Plan) -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(terminal=True, plan=plan))
    assert "sft: something odd" in text
    assert re.search(r"1 +4 +2\.1000 .*complete", text)
    assert re.search(r"2 +8 +2\.1500 .*sft: step 4/6, loss 2\.400", text)
