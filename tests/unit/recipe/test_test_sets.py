"""Test sets as a recipe writes them: short forms, mistakes, and what enters the fingerprint."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from posttrain.errors import RecipeError
from posttrain.recipe import EvaluateConfig, Recipe, result_config
from posttrain.recipe.load import validate_recipe
from posttrain.recipe.test_sets import METRICS, SHORT, Chrf, Code, ExactMatch, Json, Labels, Rouge

EVERY: list[Any] = [
    "exact_match",
    {"labels": {"choices": ["bug", "feature"], "average": "micro"}},
    "numbers",
    {"regex": {"pattern": r"^\d+$"}},
    "rouge_l",
    {"rouge": {"type": "rouge2", "stemmer": True}},
    {"bleu": None},
    "chrf++",
    {"json": {"schema": {"type": "object"}}},
    {"code": {"k": 2, "samples": 4}},
]


def recipe(metrics: list[Any], **settings: Any) -> Recipe:
    tests = {"dataset": "tests", "metrics": metrics, **settings}
    return validate_recipe(
        {
            "name": "r",
            "model": "m",
            "datasets": {"tests": {"source": "tests.jsonl"}},
            "stages": [{"evaluate": {"test_sets": [tests]}}],
        }
    )


def metrics_of(made: Recipe) -> tuple[Any, ...]:
    (stage,) = made.stages
    assert isinstance(stage, EvaluateConfig)
    return stage.test_sets[0].metrics


def problems(metrics: list[Any], **settings: Any) -> str:
    with pytest.raises(RecipeError) as error:
        recipe(metrics, **settings)
    assert len(error.value.problems) == 1, error.value
    return str(error.value.problems[0])


def test_metrics_are_written_in_short_or_with_settings():
    made = metrics_of(recipe(EVERY, run_code=True))
    assert made[0] == ExactMatch()
    assert made[1] == Labels(choices=("bug", "feature"), average="micro")
    assert made[4] == Rouge(type="rougeL")
    assert made[7] == Chrf(word_order=2, name="chrf_pp")
    assert made[9] == Code(k=2, samples=4)
    titles = ["exact_match", "labels", "numbers", "regex", "rouge_l", "rouge2", "bleu", "chrf_pp"]
    assert [metric.title for metric in made] == [*titles, "json_schema", "pass@2"]


@pytest.mark.parametrize("exclude_defaults", [True, False])
def test_a_recipe_written_back_is_the_same_recipe(exclude_defaults):
    made = recipe(EVERY, run_code=True)
    written = yaml.safe_dump(made.model_dump(mode="json", exclude_defaults=exclude_defaults))
    assert validate_recipe(yaml.safe_load(written)) == made


def test_settings_of_a_stage_survive_its_job_file():
    (stage,) = recipe(EVERY, run_code=True).stages
    assert EvaluateConfig.model_validate_json(stage.model_dump_json()) == stage


def test_every_field_is_described():
    for metric in METRICS.values():
        fields = {name: field for name, field in metric.model_fields.items() if name != "metric"}
        assert all(field.description for field in fields.values()), metric


@pytest.mark.parametrize("short", sorted({*METRICS, *SHORT} - {"labels", "regex"}))
def test_every_name_is_a_metric(short):
    assert len(metrics_of(recipe([short], run_code=True))) == 1


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["exat_match"], "did you mean `exact_match`?"),
        (["rouge-l"], "did you mean `rouge_l`"),
        (["accuracy"], "there is no metric `accuracy`; the metrics are exact_match, labels"),
        ([{"bleu": {}, "chrf": {}}], "a metric is its name"),
        ([{"bleu": "13a"}], "the settings of `bleu` must be keys and values"),
        ([], "name at least one metric"),
        (["bleu", "bleu"], "two metrics are called `bleu`; give one a name"),
        ([{"labels": {}}], "metrics[0].labels.choices: is missing"),
        ([{"labels": {"choices": ["a", "A"]}}], "two choices are the same but for case"),
        ([{"exact_match": {"extract": "Answer: .*"}}], "needs one group"),
        ([{"exact_match": {"extract": "("}}], "is no regular expression: missing )"),
        ([{"regex": {"pattern": "["}}], "metrics[0].regex.pattern: `[` is no regular expression"),
        ([{"rouge": {"type": "rouge9"}}], "write one of: 'rouge1'"),
        ([{"exact_match": {"ignore_cas": True}}], "exact_match.ignore_cas: there is no such key"),
        ([{"json": {"schema": "nowhere.json"}}], "`nowhere.json` cannot be read: No such file"),
        ([{"json": {"schema": {"type": "objekt"}}}], "not a JSON Schema at `type`"),
        ([{"json": {"schema": {"$ref": "https://x/y"}}}], "refers to `https://x/y`"),
        ([{"code": {"k": 5}}], "pass@5 needs 5 `samples` or more, not 1"),
        (["code"], "off by default: write `run_code: true`"),
    ],
)
def test_mistakes_are_explained(metrics, message):
    assert message in problems(metrics)


def test_two_of_one_metric_are_told_apart_by_name():
    made = recipe(["exact_match", {"exact_match": {"ignore_case": True, "name": "any_case"}}])
    assert [metric.title for metric in metrics_of(made)] == ["exact_match", "any_case"]


def test_what_a_schema_file_says_is_part_of_the_fingerprint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def config_with(schema: dict[str, Any], name: str) -> dict[str, Any]:
        (tmp_path / name).write_text(json.dumps(schema))
        (stage,) = recipe([{"json": {"schema": name}}]).stages
        return result_config(stage)

    one = config_with({"type": "object"}, "one.json")
    assert config_with({"type": "object"}, "two.json") == one
    assert config_with({"type": "array"}, "one.json") != one


def test_a_schema_may_be_written_as_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.yaml").write_text("type: object\nrequired: [kind]\n")
    (metric,) = metrics_of(recipe([{"json": {"schema": "schema.yaml"}}]))
    assert isinstance(metric, Json)
    assert metric.json_schema == {"type": "object", "required": ["kind"]}


def test_allowing_code_changes_no_result():
    def config(**settings: Any) -> dict[str, Any]:
        return result_config(recipe(["bleu"], **settings).stages[0])

    assert config(run_code=True) == config()
    assert config(max_new_tokens=9) != config()
