"""Who compares: how a recipe says it, and what it may not say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from posttrain.errors import RecipeError
from posttrain.recipe.base import result_config
from posttrain.recipe.judge import JudgeConfig
from posttrain.recipe.load import load_recipe

ENDPOINT = {"url": "http://localhost:8000/v1", "model": "m"}


def judge(by: object) -> JudgeConfig:
    return JudgeConfig.model_validate({"by": by})


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("people", {"people": {"raters": 2}}),
        ({"people": None}, {"people": {}}),
        ({"model": "sft"}, {"model": {"model": "sft"}}),
        ({"reward": "reward"}, {"reward": {"reward": "reward", "margin": 0.0}}),
    ],
)
def test_a_judge_in_short_is_the_same_as_in_full(short: object, long: object) -> None:
    assert judge(short) == judge(long)


@pytest.mark.parametrize("by", ["people", {"model": "a"}, {"endpoint": ENDPOINT}])
def test_what_a_stage_is_told_reads_back_as_it_was(by: object) -> None:
    config = judge(by)
    assert JudgeConfig.model_validate(config.model_dump(mode="json")) == config


def test_people_are_asked_where_nothing_else_is_said() -> None:
    assert JudgeConfig().by == judge("people").by


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ({}, "name one of"),
        ({"people": {}, "model": "a"}, "people and model"),
        ("sft", "does not say who"),
        ({"endpoint": {"url": "localhost/v1", "model": "m"}}, "no http"),
        ({"endpoint": {**ENDPOINT, "api_key": "x"}}, "api_key"),
    ],
)
def test_a_mistake_says_what_to_write(by: object, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        judge(by)


@pytest.mark.parametrize(
    "changed",
    [
        {"url": "https://u:planted-key-123@host/v1"},
        {"url": "https://host/v1?key=planted-key-123"},
        {"api_key_env": "planted-key-123"},
        {"api_key": "planted-key-123"},
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_repeated(
    tmp_path: Path, changed: dict[str, str]
) -> None:
    recipe = {
        "name": "r",
        "model": "some/model",
        "stages": [{"judge": {"by": {"endpoint": {**ENDPOINT, **changed}}}}],
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="endpoint") as error:
        load_recipe(file)
    assert "planted-key-123" not in str(error.value)


def test_what_cannot_change_a_verdict_stays_out_of_the_fingerprint() -> None:
    patient = {**ENDPOINT, "timeout_s": 1, "max_retries": 1, "concurrency": 9, "api_key_env": "K"}
    assert result_config(judge({"endpoint": patient})) == result_config(
        judge({"endpoint": ENDPOINT})
    )
    # Filled sheets count as inputs, by their content.
    rated = judge({"people": {"ratings": ["one.csv"]}})
    assert result_config(rated) == result_config(judge("people"))
    other = judge({"endpoint": {**ENDPOINT, "model": "n"}})
    assert result_config(other) != result_config(judge({"endpoint": ENDPOINT}))
