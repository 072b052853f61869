"""What is proposed after a verdict, in which order, and how it is written into a recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.evaluate.results import (
    Change as WatchedChange,
)
from posttrain.evaluate.results import (
    Check,
    Hacking,
    PerplexityCheck,
    Verdict,
    Versus,
    Watched,
    WinRateCheck,
)
from posttrain.recipe import Recipe
from posttrain.recipe.load import validate_recipe
from posttrain.repair.history import Repair, children, history, next_file, with_line
from posttrain.repair.propose import hints, propose
from posttrain.repair.remedy import Change, Insertion, Remedy
from posttrain.repair.text import differences, edit_data, edit_text, read_data

CONFIGS = Path(__file__).parents[2] / "configs"


def recipe(*stages: Any, **datasets: Any) -> Recipe:
    return validate_recipe(
        {
            "name": "test",
            "model": "folder",
            "datasets": {"chats": {"source": "chats.jsonl"}, **datasets},
            "stages": list(stages),
        }
    )


def sft(**settings: Any) -> dict[str, Any]:
    return {"sft": {"dataset": "chats", "epochs": 2, **settings}}


def check(difference: float, outcome: Any, **changes: Any) -> Check:
    fields: dict[str, Any] = {
        "task": "mmlu",
        "metric": "acc",
        "base": 0.5,
        "candidate": 0.5 + difference,
        "difference": difference,
        "low": difference - 0.02,
        "high": difference + 0.02,
        "n": 100,
        "p_worse": 0.5,
        "mcnemar_p": None,
        "smallest_detectable_drop": 0.02,
        "items_needed": None,
        "verdict": outcome,
        "sentence": f"mmlu: {difference:+.3f}",
    }
    return Check(**{**fields, **changes})


def perplexity(difference: float, outcome: Any, **changes: Any) -> PerplexityCheck:
    fields: dict[str, Any] = {
        "requirement": "must_improve",
        "base": 10.0,
        "candidate": 9.0,
        "difference": difference,
        "low": difference - 0.1,
        "high": difference + 0.1,
        "rows": 50,
        "p_worse": 0.5,
        "verdict": outcome,
        "sentence": f"perplexity: {difference:+.3f}",
    }
    return PerplexityCheck(**{**fields, **changes})


def verdict(outcome: Any, *checks: Check, **changes: Any) -> Verdict:
    fields: dict[str, Any] = {
        "verdict": outcome,
        "reasons": tuple(one.sentence for one in checks),
        "checks": checks,
        "perplexity": None,
        "max_drop": 0.02,
        "confidence": 0.95,
    }
    return Verdict(**{**fields, **changes})


def ids(remedies: list[Remedy]) -> list[str]:
    return [remedy.id for remedy in remedies]


def one(remedies: list[Remedy], start: str) -> Remedy:
    [found] = [remedy for remedy in remedies if remedy.id.startswith(start)]
    return found


FORGOT = verdict("fail", check(-0.05, "fail"))
SHORT = (sft(), "evaluate", "gate")


# Forgetting


def test_a_pass_needs_no_remedy() -> None:
    assert propose(verdict("pass", check(0.01, "pass")), recipe(*SHORT)) == []


def test_forgetting_is_answered_first_by_what_trains_nothing() -> None:
    found = propose(FORGOT, recipe(*SHORT))
    assert ids(found) == [
        *("interpolate-0.5", "replay", "learning-rate-6e-05", "epochs-1", "rank-8")
    ]
    assert found[0].edits == (
        Insertion(
            1,
            "merge",
            {"method": "interpolate", "weight": 0.5},
            "added: part of the way from base to tuned weights (WiSE-FT), so that less is "
            "forgotten",
        ),
    )
    assert found[0].why.endswith("it is 0.6 times what is allowed at 0.5, instead of 2.5 times")
    full = propose(FORGOT, recipe(sft(full={}), "evaluate", "gate"))
    assert "lora" in ids(full)
    assert "rank-8" not in ids(full)


@pytest.mark.parametrize(
    ("difference", "weight"), [(-0.02, 0.7), (-0.03, 0.7), (-0.05, 0.5), (-0.2, 0.3), (-0.5, 0.3)]
)
def test_the_larger_the_drop_the_further_it_goes_back(difference: float, weight: float) -> None:
    found = propose(verdict("fail", check(difference, "fail")), recipe(*SHORT))
    assert found[0].id == f"interpolate-{weight:g}"


def test_what_was_tried_gives_way_to_the_next_step() -> None:
    tried: list[str] = []
    for weight in (0.5, 0.3, 0.15):
        found = propose(FORGOT, recipe(*SHORT), tried=tried)[0].id
        assert found == f"interpolate-{weight}"
        tried.append(found)
    weights = [f"interpolate-{weight}" for weight in (0.85, 0.7, 0.5, 0.3, 0.15)]
    assert propose(FORGOT, recipe(*SHORT), tried=weights)[0].id == "replay"


def test_a_fold_becomes_the_interpolation_and_an_interpolation_goes_further_back() -> None:
    folded = recipe(sft(), "merge", "evaluate", "gate")
    [method, weight] = propose(FORGOT, folded)[0].edits
    assert isinstance(method, Change)
    assert isinstance(weight, Change)
    assert (method.path, method.value) == (("stages", 1, "merge", "method"), "interpolate")
    assert (weight.path, weight.value) == (("stages", 1, "merge", "weight"), 0.5)
    mixed = recipe(sft(), {"merge": {"method": "interpolate", "weight": 0.5}}, "evaluate", "gate")
    [change] = propose(FORGOT, mixed)[0].edits
    assert isinstance(change, Change)
    assert change.value == 0.3
    assert change.why.startswith("was 0.5")


def test_of_several_trainings_the_last_is_changed_and_weights_go_back_to_the_base_itself() -> None:
    stages = (
        *(sft(), "merge", {"dpo": {"dataset": "pairs"}}, {"merge": {"name": "last"}}),
        *("evaluate", "gate"),
    )
    found = propose(FORGOT, recipe(*stages, pairs={"source": "pairs.jsonl"}))
    paths = [edit.path for edit in found[0].edits if isinstance(edit, Change)]
    assert ("stages", 3, "merge", "base") in paths
    assert one(found, "beta").edits[0].value == 0.2  # type: ignore[union-attr]
    assert all(
        edit.path[1] in (2, 3)
        for remedy in found
        for edit in remedy.edits
        if isinstance(edit, Change)
    )


def test_a_candidate_that_is_named_is_named_anew() -> None:
    stages = ({"sft": {"name": "one", "dataset": "chats"}}, {"evaluate": {"model": "one"}}, "gate")
    change, insertion = propose(FORGOT, recipe(*stages))[0].edits
    assert isinstance(change, Change)
    assert isinstance(insertion, Insertion)
    assert (change.path, change.value) == (("stages", 1, "evaluate", "model"), "merge")
    assert insertion.position == 1


@pytest.mark.parametrize("adapter", [{"type": "prefix"}, {"type": "bottleneck"}])
def test_what_is_no_part_of_the_weights_is_not_mixed_with_them(adapter: dict[str, Any]) -> None:
    assert ids(propose(FORGOT, recipe(sft(adapter=adapter), "evaluate", "gate")))[0] == "replay"


def test_worse_on_both_sides_is_not_answered_by_going_back() -> None:
    both = verdict("fail", check(-0.05, "fail"), perplexity=perplexity(0.0, "fail"))
    found = ids(propose(both, recipe(*SHORT)))
    assert found[0] == "learning-rate-6e-05"
    assert found[-1].startswith("interpolate")


def test_general_rows_are_replayed_where_the_recipe_has_some() -> None:
    general = {"general": {"source": "general.jsonl"}}
    found = one(propose(FORGOT, recipe(*SHORT, **general)), "replay")
    after = read_data(yaml.safe_dump(recipe(*SHORT, **general).model_dump(exclude_defaults=True)))
    for edit in found.edits:
        after = edit_data(after, edit)
    mix = after["stages"][0]["mix"]
    assert mix["replay"] == {"dataset": "general", "fraction": 0.1}
    assert after["stages"][1]["sft"]["dataset"] == mix["name"] == "chats-with-general"
    assert after["stages"][2]["evaluate"]["dataset"] == "chats"
    validate_recipe(after)
    without = one(propose(FORGOT, recipe(*SHORT)), "replay")
    assert not without.can_be_written
    assert "general: {source: general.jsonl}" in without.by_hand


def test_a_replay_that_is_there_becomes_larger_up_to_a_fifth() -> None:
    def share(fraction: float) -> list[Remedy]:
        mix = {
            "name": "all",
            "sources": [{"dataset": "chats"}],
            "replay": {"dataset": "general", "fraction": fraction},
        }
        stages = ({"mix": mix}, sft(dataset="all"), "evaluate", "gate")
        found = propose(FORGOT, recipe(*stages, general={"source": "general.jsonl"}))
        return [remedy for remedy in found if remedy.id.startswith("replay")]

    assert ids(share(0.05)) == ["replay-0.1"]
    assert ids(share(0.2)) == []


def test_perplexity_on_other_rows_than_those_trained_on_is_forgetting() -> None:
    risen = verdict("fail", perplexity=perplexity(-0.02, "fail", requirement="must_not_rise"))
    texts = {"texts": {"source": "texts.jsonl"}}
    other = recipe(sft(), {"evaluate": {"dataset": "texts"}}, "gate", **texts)
    assert propose(risen, other)[0].id == "interpolate-0.7"
    same = ids(propose(risen, recipe(*SHORT)))
    assert same[0] == "epochs-1"
    assert not any(name.startswith("interpolate") for name in same)


# Too little learned, too little measured


def test_what_learned_nothing_learns_harder() -> None:
    nothing = verdict("fail", perplexity=perplexity(0.01, "fail"))
    found = propose(nothing, recipe(*SHORT))
    assert ids(found) == ["epochs-4", "learning-rate-0.0006", "rank-32", "more-rows"]
    mixed = recipe(sft(), {"merge": {"method": "interpolate", "weight": 0.5}}, "evaluate", "gate")
    assert propose(nothing, mixed)[0].id == "interpolate-0.7"


def test_an_open_check_is_first_answered_by_more_items() -> None:
    open_check = check(-0.001, "not enough evidence", items_needed=350, n=100)
    stages = (sft(), {"evaluate": {"tasks": ["mmlu"], "limit": 20}}, "gate")
    found = propose(verdict("not enough evidence", open_check), recipe(*stages))
    assert found[0].edits == (
        Change(
            ("stages", 1, "evaluate", "limit"),
            70,
            "was 20: about as many items as would settle it",
        ),
    )
    assert found[1].id.startswith("interpolate")
    every = propose(verdict("not enough evidence", open_check), recipe(*SHORT))
    assert not every[0].can_be_written
    assert "all items are asked already" in every[0].by_hand


def test_prompts_rows_and_ratings_are_asked_for_by_what_is_missing() -> None:
    won = WinRateCheck(
        judge="model judge",
        opponent="base",
        prompts=60,
        win_rate=0.55,
        low=0.45,
        high=0.65,
        required=0.5,
        prompts_needed=240,
        verdict="not enough evidence",
        sentence="55% of 60 prompts won",
    )
    rows = perplexity(0.05, "not enough evidence", rows=200)
    stages = (sft(), "evaluate", "judge", "gate")
    found = propose(verdict("not enough evidence", win_rate=won, perplexity=rows), recipe(*stages))
    prompts, held_out = one(found, "prompts"), one(found, "perplexity-rows")
    assert prompts.edits[0].value == 240  # type: ignore[union-attr]
    [change] = held_out.edits
    assert isinstance(change, Change)
    # The bound lies 0.1 below 0.05; to lie 0.05 / 1.5 below it takes (0.15 / 0.05) ** 2 times more.
    assert change.value == pytest.approx(9 * 200, rel=0.06)
    nobody = won.model_copy(update={"win_rate": None, "prompts": 0})
    found = propose(verdict("not enough evidence", win_rate=nobody), recipe(*stages))
    assert found[0].id == "ratings"
    assert not found[0].can_be_written


# Rewards, champions


def watched(longer: float) -> Watched:
    def moved(name: str, difference: float) -> WatchedChange:
        return WatchedChange(
            name=name,
            before=10.0,
            after=10.0 + difference,
            difference=difference,
            low=None,
            high=None,
            n=50,
            p_value=0.001,
            shown=True,
            detectable=None,
            sentence=name,
        )

    hacking = Hacking(
        flagged=True,
        audited=True,
        text="flagged: the reward rose while the judge fell",
        step=20,
        confidence=0.95,
        reward=moved("reward", 2.0),
        signals=(moved("judge", -1.0),),
        style=(moved("length", longer),),
        warnings=(),
    )
    return Watched(step="ppo", hacking=hacking)


PPO = {"ppo": {"dataset": "chats", "reward": "rewards.py:brevity", "max_steps": 40}}


def test_a_hacked_reward_is_held_back() -> None:
    flagged = verdict("fail", watched=(watched(longer=40.0),))
    found = propose(flagged, recipe(PPO, "evaluate", "gate"))
    assert ids(found) == [
        *("kl-coef-0.1", "length-penalty-0.05", "max-steps-20", "learning-rate-3e-06"),
        "reward-terms",
    ]
    same_length = verdict("fail", watched=(watched(longer=0.0),))
    assert "length-penalty" not in str(ids(propose(same_length, recipe(PPO, "evaluate", "gate"))))
    grpo = {"grpo": {"name": "ppo", "dataset": "chats", "reward": "rewards.py:brevity"}}
    found = propose(flagged, recipe(grpo, "evaluate", "gate"))
    assert found[0].id == "beta-0.1"


def test_a_flag_that_the_gate_ignores_is_ignored() -> None:
    both = verdict("fail", check(-0.05, "fail"), watched=(watched(40.0),))
    ignoring = recipe(PPO, "evaluate", {"gate": {"reward_hacking": "ignore"}})
    assert propose(both, ignoring)[0].id == "interpolate-0.5"


def test_behind_the_champion_the_champion_is_where_to_start() -> None:
    versus = Versus(
        opponent="champion voice v3",
        verdict="fail",
        reasons=("mmlu: -0.05",),
        checks=(),
        perplexities=(),
    )
    [found] = propose(verdict("fail", champion=versus), recipe(*SHORT))
    assert found.id == "champion"
    assert "beside champion voice v3: mmlu: -0.05" in found.why


def test_hints_name_the_command_and_the_next_best() -> None:
    lines = hints(propose(FORGOT, recipe(*SHORT)), "sft.yaml")
    assert lines[0].startswith("posttrain repair sft.yaml would interpolate: 0.5 of the way")
    assert lines[1].startswith("  or: lower learning rate")
    assert len(lines) == 3
    assert hints([], "sft.yaml") == []


def test_proposing_loads_nothing_heavy() -> None:
    code = (
        "import sys, posttrain.repair.propose; "
        "print([name for name in ('torch', 'scipy', 'prefect', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The text


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_is_edited_where_it_stands(file: Path) -> None:
    text = file.read_text()
    stages = read_data(text)["stages"]
    bodies = [(n, *next(iter(stage.items()))) for n, stage in enumerate(stages) if stage != "gate"]
    edits: list[Change | Insertion] = []
    for n, kind, _ in bodies:
        edits.append(Change(("stages", n, kind, "new"), 1, "was nothing"))
        edits.append(Change(("stages", n, kind, "nested", "deep"), 2e-5, "was nothing"))
    for n, kind, body in bodies:
        if body:
            edits.append(Change(("stages", n, kind, next(iter(body))), "changed", "was other"))
    edits.append(Insertion(len(stages) - 1, "merge", {"name": "added"}, "added"))
    edits.append(Insertion(0, "merge", {"name": "first"}, "added"))
    wanted = read_data(text)
    for edit in edits:
        wanted = edit_data(wanted, edit)
    edited = edit_text(text, edits)
    assert read_data(edited) == wanted
    comments = [line.strip() for line in text.splitlines() if line.strip().startswith("#")]
    assert [line for line in edited.splitlines() if line.strip() in comments]
    assert all(line in edited for line in comments)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("- merge", "# weight was 0.7\n- merge: {weight: 0.5}"),
        ("- merge:", "# weight was 0.7\n- merge: {weight: 0.5}"),
        ("- merge: {}", "# weight was 0.7\n- merge: {weight: 0.5}"),
        ("- merge: {weight: 0.7}  # mine", "# weight was 0.7\n- merge: {weight: 0.5}  # mine"),
        (
            "- merge: {weight: 0.7,\n    t: 1}",
            "# weight was 0.7\n- merge: {weight: 0.5,\n    t: 1}",
        ),
        (
            "- merge:\n    weight: 0.7  # mine\n    t: 1",
            "- merge:\n    # weight was 0.7\n    weight: 0.5  # mine\n    t: 1",
        ),
        (
            "- merge:\n    models:\n      - a  # mine\n\n  # of the gate",
            "- merge:\n    models:\n      - a  # mine\n    # weight was 0.7\n    weight: 0.5\n\n"
            "  # of the gate",
        ),
    ],
)
def test_a_key_is_set_in_every_style(before: str, after: str) -> None:
    text = f"name: x\nstages:\n{before}\n- gate\n"
    change = Change(("stages", 0, "merge", "weight"), 0.5, "was 0.7")
    assert edit_text(text, [change]) == f"name: x\nstages:\n{after}\n- gate\n"


def test_a_stage_is_added_below_the_one_before_and_above_the_comment_of_the_next() -> None:
    text = "stages:\n  - sft:\n      dataset: a   # mine\n\n  # Decides.\n  - gate: {}"
    added = Insertion(1, "merge", {"weight": 0.5}, "added: less")
    assert edit_text(text, [added]) == (
        "stages:\n  - sft:\n      dataset: a   # mine\n"
        "  # added: less\n  - merge: {weight: 0.5}\n\n  # Decides.\n  - gate: {}\n"
    )
    flow = "stages: [{sft: {dataset: a}}, gate]\n"
    assert read_data(edit_text(flow, [added]))["stages"] == [
        *({"sft": {"dataset": "a"}}, {"merge": {"weight": 0.5}}, "gate")
    ]


def test_all_weights_give_way_to_an_adapter_in_the_same_place() -> None:
    text = "stages:\n  - sft:\n      full: {zero: 3}\n      epochs: 2\n"
    change = Change(("stages", 0, "sft", "adapter"), {"rank": 8}, "for all", in_place_of="full")
    assert edit_text(text, [change]) == (
        "stages:\n  - sft:\n      # adapter for all\n      adapter: {rank: 8}\n      epochs: 2\n"
    )


def test_what_is_shared_by_an_anchor_is_changed_in_one_place_only() -> None:
    text = (
        "# Head.\nstages:\n- sft: &settings {dataset: a, epochs: 2}\n- dpo: *settings\n- gate: {}\n"
    )
    edited = edit_text(text, [Change(("stages", 1, "dpo", "epochs"), 1, "was 2")])
    stages = read_data(edited)["stages"]
    assert (stages[0]["sft"]["epochs"], stages[1]["dpo"]["epochs"]) == (2, 1)
    assert edited.startswith("# Head.\n# epochs was 2\n")


def test_differences_are_the_changes_that_make_them() -> None:
    before = {"a": {"b": 1, "c": [1, {"d": 2}]}, "e": 3}
    after = {"a": {"b": 2, "c": [1, {"d": 3, "f": 4}]}, "e": 3}
    found = differences(before, after, "why")
    assert [(change.path, change.value) for change in found] == [
        (("a", "b"), 2),
        (("a", "c", 1, "d"), 3),
        (("a", "c", 1, "f"), 4),
    ]


# The history


def test_a_recipe_knows_its_repairs_and_its_repaired_recipes(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("# Mine.\nname: x\n")
    assert next_file(file).name == "sft.repair-1.yaml"
    first = tmp_path / "sft.repair-1.yaml"
    text = with_line(file.read_text(), Repair(1, "sft.yaml", "interpolate-0.5"), "mmlu fell")
    first.write_text(text)
    second = tmp_path / "sft.repair-2.yaml"
    second.write_text(with_line(text, Repair(2, first.name, "epochs-1"), "mmlu fell again"))
    assert second.read_text().splitlines() == [
        "# repair 1 of sft.yaml: interpolate-0.5",
        "#   mmlu fell",
        "# repair 2 of sft.repair-1.yaml: epochs-1",
        "#   mmlu fell again",
        "# Mine.",
        "name: x",
    ]
    assert [repair.remedy for repair in history(second.read_text())] == [
        *("interpolate-0.5", "epochs-1")
    ]
    assert next_file(first).name == "sft.repair-3.yaml"
    assert [path.name for path, _ in children(file)] == ["sft.repair-1.yaml"]
    assert [path.name for path, _ in children(first)] == ["sft.repair-2.yaml"]
