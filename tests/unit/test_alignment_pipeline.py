"""Laying out alignment: what the reward comes from, what is shared, what the gate compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.aligning import Alignment, alignment_recipe, write_recipe
from posttrain.errors import RecipeError, UsageError
from posttrain.opening import open_pipeline
from posttrain.pipeline import Code, Pipeline
from posttrain.store import Store

CHAT = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}]}
PAIR = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}
EVALUATE = {"dataset": "chats"}


@pytest.fixture
def open_recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens a recipe of the given stages on two chats and two pairs, with a reward function."""
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text((json.dumps(CHAT) + "\n") * 2)
    Path("pairs.jsonl").write_text((json.dumps(PAIR) + "\n") * 2)
    Path("rewards.py").write_text("def brevity(answers): return [-len(a) for a in answers]\n")

    def build(*stages: Any) -> Pipeline:
        recipe = {
            "name": "test",
            "model": str(tiny_model),
            "datasets": {"chats": {"source": "chats.jsonl"}, "pairs": {"source": "pairs.jsonl"}},
            "stages": list(stages),
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        return open_pipeline(Path("recipe.yaml"), [], Store(tmp_path / "store"))

    return build


def test_a_reward_model_is_no_start_for_the_next_stage(open_recipe: Any) -> None:
    pipeline = open_recipe(
        {"sft": {"dataset": "chats"}},
        "merge",
        {"reward": {"dataset": "pairs"}},
        {"ppo": {"dataset": "chats", "reward": "reward"}},
    )
    ppo = pipeline.step("ppo")
    assert ppo.inputs["model"] == pipeline.step("merge").output
    assert ppo.inputs["reward:reward"] == pipeline.step("reward").output
    assert pipeline.step("reward").kind == "reward"


def test_a_reward_function_is_an_input_by_its_files_content(open_recipe: Any) -> None:
    stage = {"grpo": {"dataset": "chats", "reward": "rewards.py:brevity"}}
    before = open_recipe(stage).step("grpo").inputs["reward:brevity"]
    Path("rewards.py").write_text("def brevity(answers): return [0.0 for _ in answers]\n")
    after = open_recipe(stage).step("grpo").inputs["reward:brevity"]
    assert isinstance(before, Code)
    assert before.path == after.path
    assert before.digest != after.digest


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("judge", "no stage before it is `judge`"),
        ("missing.py:brevity", "there is no file missing.py"),
    ],
)
def test_a_reward_that_is_not_there_is_said_before_anything_runs(
    open_recipe: Any, reward: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        open_recipe({"ppo": {"dataset": "chats", "reward": reward}})


def test_another_beta_finds_the_references_scores(open_recipe: Any) -> None:
    one = {"name": "one", "dataset": "pairs", "model": "base", "reference": "cached"}
    two = {**one, "name": "two", "beta": 0.5}
    pipeline = open_recipe({"dpo": one}, {"dpo": two})
    assert [step.stage for step in pipeline.steps].count("reference") == 1
    assert pipeline.step("one").inputs["reference"] == pipeline.step("two").inputs["reference"]


def test_the_base_is_measured_once_for_both_branches(open_recipe: Any) -> None:
    pipeline = open_recipe(
        {"dpo": {"dataset": "pairs", "model": "base"}},
        {"evaluate": {"name": "evaluate-dpo", "model": "dpo", **EVALUATE}},
        {"kto": {"dataset": "pairs", "model": "base"}},
        {"evaluate": {"name": "evaluate-kto", "model": "kto", **EVALUATE}},
        {"gate": {"candidates": ["evaluate-dpo", "evaluate-kto"]}},
    )
    assert [step.stage for step in pipeline.steps].count("evaluate") == 3
    assert set(pipeline.step("gate").inputs) == {
        "base",
        "candidate:evaluate-dpo",
        "candidate:evaluate-kto",
        "trained:dpo",
        "trained:kto",
    }


def test_a_gate_compares_only_what_was_measured_alike(open_recipe: Any) -> None:
    with pytest.raises(RecipeError, match="not measured alike"):
        open_recipe(
            {"dpo": {"dataset": "pairs", "model": "base"}},
            {"evaluate": {"name": "one", "model": "dpo", **EVALUATE}},
            {"evaluate": {"name": "two", "model": "dpo", **EVALUATE, "max_perplexity_rows": 3}},
            {"gate": {"candidates": ["one", "two"]}},
        )


def test_the_gate_sees_what_watched_over_the_training(open_recipe: Any) -> None:
    pipeline = open_recipe(
        {"ppo": {"dataset": "chats", "reward": "rewards.py:brevity"}},
        "merge",
        {"sft": {"dataset": "chats"}},
        {"evaluate": EVALUATE},
        "gate",
    )
    assert pipeline.step("gate").inputs["watch:ppo"] == pipeline.step("ppo").output


def test_pairs_have_no_perplexity_so_the_chats_before_them_are_measured(open_recipe: Any) -> None:
    pipeline = open_recipe(
        {"sft": {"dataset": "chats"}}, "merge", {"dpo": {"dataset": "pairs"}}, "evaluate"
    )
    assert pipeline.step("evaluate").inputs["dataset"] == pipeline.step("prepare-chats").output


def test_two_methods_side_by_side_are_one_recipe_with_one_gate(
    open_recipe: Any, tmp_path: Path, tiny_model: Path
) -> None:
    open_recipe({"sft": {"dataset": "chats"}})
    alignment = Alignment(
        model=str(tiny_model),
        data="pairs.jsonl",
        methods=("dpo", "ppo"),
        texts="chats.jsonl",
    )
    file = write_recipe(alignment_recipe(alignment), tmp_path / "recipes")
    pipeline = open_pipeline(file, [], Store(tmp_path / "store"))
    stages = [step.stage for step in pipeline.steps]
    assert {"dpo", "reward", "ppo"} < set(stages)
    assert stages.count("gate") == 1
    gate = pipeline.step("gate").inputs
    assert {"candidate:evaluate-dpo", "candidate:evaluate-ppo", "watch:evaluate-ppo:ppo"} < set(
        gate
    )
    for method in ("dpo", "ppo"):
        assert pipeline.step(method).inputs["model"] == pipeline.step("reward").inputs["model"]


def test_an_alignment_that_nothing_judges_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to judge"):
        alignment_recipe(Alignment(model="folder", data="pairs.jsonl"))
