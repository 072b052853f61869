"""Laying out a recipe: what is added, what cannot follow what, and how that reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.errors import RecipeError
from posttrain.opening import open_pipeline
from posttrain.pipeline import Pipeline
from posttrain.store import Store

CHAT = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}]}
PAIR = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}


@pytest.fixture
def open_recipe(tmp_path: Path, tiny_model: Path) -> Any:
    """Opens a recipe of the given stages on two chats and two preference pairs."""
    (tmp_path / "chats.jsonl").write_text((json.dumps(CHAT) + "\n") * 2)
    (tmp_path / "pairs.jsonl").write_text((json.dumps(PAIR) + "\n") * 2)

    def build(*stages: Any, **changes: Any) -> Pipeline:
        recipe = {
            "name": "test",
            "model": str(tiny_model),
            "datasets": {
                "chats": {"source": str(tmp_path / "chats.jsonl")},
                "pairs": {"source": str(tmp_path / "pairs.jsonl")},
            },
            "stages": list(stages),
            **changes,
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return open_pipeline(file, [], Store(tmp_path / "store"))

    return build


def test_what_a_recipe_leaves_unsaid_is_added(open_recipe: Any) -> None:
    pipeline = open_recipe({"sft": {"dataset": "chats"}}, "merge", "evaluate", "gate")
    assert [step.name for step in pipeline.steps] == [
        *("preflight", "prepare-chats", "evaluate-base", "sft", "merge", "evaluate", "gate")
    ]


def test_a_stage_kind_may_occur_twice(open_recipe: Any) -> None:
    full = {"sft": {"dataset": "chats", "adapter": None}}
    pipeline = open_recipe(full, {"sft": {"dataset": "chats", "name": "again"}})
    names = [step.name for step in pipeline.steps if step.stage == "sft"]
    assert names == ["sft", "again"]
    assert pipeline.step("again").inputs["model"] == pipeline.step("sft").output


def test_a_stage_may_start_from_a_named_one(open_recipe: Any) -> None:
    full = {"sft": {"dataset": "chats", "adapter": None}}
    other = {"sft": {"dataset": "chats", "name": "other", "model": "sft", "seed": 1}}
    third = {"sft": {"dataset": "chats", "name": "third", "model": "sft", "seed": 2}}
    pipeline = open_recipe(full, other, third)
    assert pipeline.step("third").inputs["model"] == pipeline.step("sft").output


SFT = {"sft": {"dataset": "chats"}}
FULL = {"sft": {"dataset": "chats", "adapter": None}}

WRONG: dict[str, tuple[list[Any], str]] = {
    "merging nothing": (
        ["merge"],
        "stages[0].merge: there is nothing to merge: no stage before it trains an adapter\n"
        "    remove this stage",
    ),
    "merging all weights": (
        [FULL, "merge"],
        "stages[1].merge: there is nothing to merge: `sft` leaves all weights\n"
        "    remove this stage",
    ),
    "training on an adapter": (
        [SFT, {"sft": {"dataset": "chats", "name": "more"}}],
        "stages[1].sft: starts from the adapter that `sft` leaves\n"
        "    put `- merge: {}` before this stage, or train all weights there",
    ),
    "a gate without numbers": (
        [SFT, "gate"],
        "stages[1].gate: has no numbers to decide on\n"
        "    put `- evaluate: {tasks: [...]}` before it",
    ),
    "a gate on the base": (
        [{"evaluate": {"dataset": "chats"}}, "gate"],
        "stages[1].gate: would compare the base model with itself\n"
        "    put the gate after a stage that trains",
    ),
    "nothing to measure": (
        ["evaluate"],
        "stages[0].evaluate: has nothing to measure\n"
        "    name `tasks`, or a `dataset` for perplexity",
    ),
    "an unknown dataset": (
        [{"sft": {"dataset": "chat"}}],
        "stages[0].sft.dataset: there is no dataset `chat`\n"
        "    add it under `datasets`; the recipe has: chats, pairs",
    ),
    "an unknown stage": (
        [SFT, {"merge": {"model": "stf"}}],
        "stages[1].merge.model: no stage before this one is `stf`\n"
        "    stages with a model: sft",
    ),
    "preparing twice": (
        [{"prepare": {"dataset": "chats"}}, {"prepare": {"dataset": "chats"}}],
        "stages[1].prepare: `chats` was prepared already\n    remove one of them",
    ),
    "preparing too late": (
        [SFT, {"prepare": {"dataset": "chats"}}],
        "stages[0].sft.dataset: `chats` is prepared by a later stage\n    move that stage up",
    ),
    "the wrong rows": (
        [{"sft": {"dataset": "pairs"}}],
        "datasets.pairs.format: its rows are preferences, but the stage that uses it needs chats",
    ),
    "our questions on other rows": (
        [SFT, {"evaluate": {"tasks": ["python_docs_trained"]}}],
        "stages[1].evaluate.tasks: `python_docs_trained` asks about Python objects, and `chats` "
        "has none\n    use it with a dataset of source builtin:python-docs/chats",
    ),
    "more processes than rows": (
        [{"sft": {"dataset": "chats", "batching": {"batch_size": 3},
                  "launch": {"num_processes": 2}}}],
        "stages[0].sft (line 9): a batch of 3 rows on 2 processes: batch_size must be a multiple "
        "of launch.num_processes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_what_cannot_work_is_said_before_anything_runs(open_recipe: Any, mistake: str) -> None:
    stages, message = WRONG[mistake]
    with pytest.raises(RecipeError) as caught:
        open_recipe(*stages)
    assert message in str(caught.value)


def test_a_model_without_a_chat_template_is_refused(
    open_recipe: Any, tiny_model: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_model.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RecipeError, match="has no chat template"):
        open_recipe(SFT, model=str(bare))


def test_mistakes_in_model_data_and_order_stand_in_one_report(open_recipe: Any) -> None:
    datasets = {"chats": {"source": "nowhere.jsonl"}}
    with pytest.raises(RecipeError) as caught:
        open_recipe(FULL, "merge", model="./nowhere", datasets=datasets)
    assert {problem.where for problem in caught.value.problems} == {
        *("model", "datasets.chats.source", "stages[1].merge")
    }
