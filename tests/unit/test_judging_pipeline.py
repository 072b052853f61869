"""Which models are measured, compared, judged and registered, from what a recipe says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.building import build_pipeline
from posttrain.errors import RecipeError
from posttrain.model_reference import resolve_model
from posttrain.opening import open_pipeline
from posttrain.pipeline import Pipeline, Rows
from posttrain.recipe.load import load_recipe
from posttrain.registry import Champion
from posttrain.store import Store
from tests.unit.lineage_store import Made, source

CHAT = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}]}
SFT = {"sft": {"dataset": "chats"}}


@pytest.fixture
def open_recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens a recipe of the given stages on small datasets."""
    monkeypatch.chdir(tmp_path)
    for name in ("chats", "general", "tests"):
        Path(f"{name}.jsonl").write_text((json.dumps(CHAT) + "\n") * 2)
    Path("texts.jsonl").write_text('{"text": "One text."}\n')

    def build(*stages: Any, champions: dict[str, Champion] | None = None) -> Pipeline:
        recipe = {
            "name": "test",
            "model": str(tiny_model),
            "datasets": {
                name: {"source": f"{name}.jsonl"} for name in ("chats", "general", "tests", "texts")
            },
            "stages": list(stages),
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        store = Store(tmp_path / "store")
        if champions is None:
            return open_pipeline(Path("recipe.yaml"), [], store)
        loaded = load_recipe(Path("recipe.yaml"), [])
        model = resolve_model(str(tiny_model), store.digests)
        rows = {name: Rows(name, spec, name) for name, spec in loaded.datasets.items()}
        return build_pipeline(loaded, model, rows, store.digests, champions=champions)

    return build


def champion(tmp_path: Path) -> Champion:
    made = Made(tmp_path / "champions")
    model = made.put("merge", "model", {"rows": source()}, lambda f: (f / "weights").touch())
    return Champion("assistant", 3, model)


def names(pipeline: Pipeline) -> list[str]:
    return [step.name for step in pipeline.steps]


def test_other_datasets_and_test_sets_are_inputs_of_both_evaluations(open_recipe: Any) -> None:
    pipeline = open_recipe(
        SFT,
        "merge",
        {
            "evaluate": {
                "other_datasets": ["general"],
                "test_sets": [{"dataset": "tests", "metrics": ["exact_match"]}],
            }
        },
    )
    for name in ("evaluate-base", "evaluate"):
        inputs = pipeline.step(name).inputs
        assert inputs["dataset:general"] == pipeline.step("prepare-general").output
        # Nobody trains on these rows, so all of them are asked, as they are.
        assert isinstance(inputs["tests:tests"], Rows)


def test_a_test_set_that_is_trained_on_is_asked_for_its_held_out_rows(open_recipe: Any) -> None:
    tests = [{"dataset": "chats", "metrics": ["exact_match"]}]
    pipeline = open_recipe(SFT, {"evaluate": {"test_sets": tests}})
    asked = pipeline.step("evaluate").inputs["tests:chats"]
    assert asked == pipeline.step("prepare-chats").output


def test_the_champion_is_measured_like_the_candidate(open_recipe: Any, tmp_path: Path) -> None:
    best = champion(tmp_path)
    pipeline = open_recipe(
        *(SFT, "merge", "evaluate", "gate", {"register": {"name": "assistant"}}),
        champions={"assistant": best},
    )
    assert names(pipeline)[-5:] == ["sft", "merge", "evaluate", "gate", "register"]
    measured, candidate = pipeline.step("evaluate-champion"), pipeline.step("evaluate")
    assert measured.inputs == {**candidate.inputs, "model": best.artifact}
    assert pipeline.step("gate").inputs["champion"] == measured.output
    assert pipeline.step("gate").config.champion == "assistant"  # type: ignore[attr-defined]


def test_a_first_candidate_has_no_champion_to_stand_beside(open_recipe: Any) -> None:
    pipeline = open_recipe(SFT, "merge", "evaluate", "gate", {"register": {"name": "assistant"}})
    assert "evaluate-champion" not in names(pipeline)
    assert "champion" not in pipeline.step("gate").inputs


def test_a_champion_may_be_ignored(open_recipe: Any, tmp_path: Path) -> None:
    gate = {"gate": {"champion": "assistant", "against_champion": "ignore"}}
    best = {"assistant": champion(tmp_path)}
    assert "champion" not in open_recipe(SFT, "evaluate", gate, champions=best).step("gate").inputs


def test_a_gate_after_each_stage_finds_the_stage_at_fault(open_recipe: Any) -> None:
    first = {"evaluate": {"name": "measure-sft"}}
    again = {"sft": {"dataset": "general", "name": "more", "model": "merge"}}
    second = {"evaluate": {"name": "measure-more", "dataset": "chats"}}
    last = {"gate": {"against": "measure-sft", "name": "last"}}
    pipeline = open_recipe(SFT, "merge", first, {"gate": {"name": "early"}}, again, second, last)
    early, late = pipeline.step("early").inputs, pipeline.step("last").inputs
    assert early["base"] == pipeline.step("measure-sft-base").output
    assert late["base"] == pipeline.step("measure-sft").output
    assert late["candidate"] == pipeline.step("measure-more").output
    assert {name for name in late if name.startswith("trained:")} == {"trained:sft", "trained:more"}


def test_a_judge_compares_the_model_with_the_base_and_tells_the_gate(open_recipe: Any) -> None:
    pipeline = open_recipe(SFT, "merge", "evaluate", {"judge": {"prompts": 2}}, "gate")
    judge = pipeline.step("judge")
    assert judge.inputs["model"] == pipeline.step("merge").output
    assert judge.inputs["opponent"] == pipeline.step("evaluate-base").inputs["model"]
    assert pipeline.step("gate").inputs["comparison"] == judge.output


def test_a_judge_may_be_a_stage_or_people_whose_sheets_are_read(open_recipe: Any) -> None:
    by_model = open_recipe(SFT, {"judge": {"by": {"model": "base"}}}).step("judge")
    assert by_model.inputs["judge"] == by_model.inputs["opponent"]
    Path("anna.csv").write_text("filled\n")
    people = {"by": {"people": {"ratings": ["anna.csv"]}}}
    sheets = open_recipe(SFT, {"judge": people}).step("judge").inputs["ratings:0"]
    Path("anna.csv").write_text("filled otherwise\n")
    assert open_recipe(SFT, {"judge": people}).step("judge").inputs["ratings:0"] != sheets


def test_what_the_gate_chooses_among_several_is_registered(open_recipe: Any) -> None:
    pipeline = open_recipe(
        {"sft": {"dataset": "chats", "full": {}, "adapter": None, "name": "one"}},
        {"evaluate": {"name": "of-one", "dataset": "chats"}},
        {"sft": {"dataset": "chats", "full": {}, "adapter": None, "model": "base", "name": "two"}},
        {"evaluate": {"name": "of-two", "dataset": "chats"}},
        {"gate": {"candidates": ["of-one", "of-two"]}},
        {"register": {"name": "assistant"}},
    )
    inputs = pipeline.step("register").inputs
    assert inputs["model:of-one"] == pipeline.step("one").output
    assert inputs["model:of-two"] == pipeline.step("two").output
    assert inputs["verdict"] == pipeline.step("gate").output


WRONG: dict[str, tuple[list[Any], str]] = {
    "registering without a gate": (
        [SFT, "merge", {"register": {"name": "assistant"}}],
        "stages[2].register: would register a model that no gate has passed\n"
        "    put `- gate: {}` before it, after an `evaluate`; or register by hand",
    ),
    "registering an adapter": (
        [SFT, "evaluate", "gate", {"register": {"name": "assistant"}}],
        "stages[3].register: needs complete weights, and this is an adapter\n"
        "    put `- merge: {}` before the evaluation",
    ),
    "registering what was not judged": (
        [SFT, "evaluate", "gate", "merge", {"register": {"name": "assistant", "model": "merge"}}],
        "stages[4].register.model: `gate` has not judged the model of `merge`",
    ),
    "judging a model against itself": (
        [SFT, {"judge": {"model": "base"}}],
        "stages[1].judge: would compare a model with itself",
    ),
    "a judge that is not there": (
        [SFT, {"judge": {"by": {"reward": "taste"}}}],
        "stages[1].judge.by.reward: no stage before it is `taste`\n"
        "    reward stages before it: none",
    ),
    "a judging model that is not there": (
        [SFT, {"judge": {"by": {"model": "models/nowhere"}}}],
        "stages[1].judge.by.model: ",
    ),
    "a judge without its key": (
        [
            SFT,
            {
                "judge": {
                    "by": {
                        "endpoint": {
                            "url": "http://localhost:1/v1",
                            "model": "any",
                            "api_key_env": "NOBODYS_KEY",
                        }
                    }
                }
            },
        ],
        "stages[1].judge.by.endpoint.api_key_env: the environment variable NOBODYS_KEY is not set",
    ),
    "prompts from documents": (
        [SFT, {"judge": {"dataset": "texts"}}],
        "stages[1].judge.dataset: `texts` holds documents, which are no prompts",
    ),
    "sheets that are not there": (
        [SFT, {"judge": {"by": {"people": {"ratings": ["anna.csv"]}}}}],
        "stages[1].judge.by.people.ratings[0]: there is no file `anna.csv`",
    ),
    "a gate against a later evaluation": (
        [SFT, "evaluate", {"gate": {"against": "later"}}],
        "stages[2].gate.against: no evaluation before it is `later`\n"
        "    evaluations before it: evaluate",
    ),
    "a gate on a task that nobody asks": (
        [SFT, "evaluate", {"gate": {"must_improve": ["chats:rouge_l"]}}],
        "stages[2].gate.must_improve: no task `chats:rouge_l` is evaluated",
    ),
    "two judges before one gate": (
        [SFT, "evaluate", {"judge": {"name": "one"}}, {"judge": {"name": "two"}}, "gate"],
        "stages[4].gate: one and two judge one model, and the gate looks at one judge",
    ),
    "a gate against its own candidate": (
        [SFT, "evaluate", {"gate": {"against": "evaluate"}}],
        "stages[2].gate: would compare `evaluate` with itself",
    ),
    "a test set of documents": (
        [SFT, {"evaluate": {"test_sets": [{"dataset": "texts", "metrics": ["exact_match"]}]}}],
        "stages[1].evaluate.test_sets[0].dataset: `texts` holds documents, and a test set needs "
        "chats",
    ),
    "a test set that is not there": (
        [SFT, {"evaluate": {"test_sets": [{"dataset": "cats", "metrics": ["exact_match"]}]}}],
        "stages[1].evaluate.test_sets[0].dataset: there is no dataset `cats`",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_what_cannot_be_judged_is_said_before_anything_runs(open_recipe: Any, mistake: str) -> None:
    stages, message = WRONG[mistake]
    with pytest.raises(RecipeError) as caught:
        open_recipe(*stages)
    assert message in str(caught.value)
