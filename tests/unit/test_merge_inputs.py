"""Merges in a recipe: what they start from, and what is refused when the recipe is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.errors import RecipeError
from posttrain.execute import StageObserver, run_step
from posttrain.opening import open_pipeline
from posttrain.pipeline import Pipeline
from posttrain.recipe import MergeConfig
from posttrain.recipe.adapters import Quantization
from posttrain.store import Artifact, Store
from tests.unit.lineage_store import Made

FULL: dict[str, Any] = {"adapter": None}
BOTH = ["one", "two"]


def sft(name: str, dataset: str = "chats", **settings: Any) -> dict[str, Any]:
    """A short SFT stage, from the recipe's base unless it says otherwise."""
    short = {
        "batching": {"batch_size": 4, "max_length": 64},
        "optimization": {"learning_rate": 1e-2},
        "dtype": "float32",
    }
    return {"sft": {"name": name, "dataset": dataset, "model": "base", **short, **settings}}


def merge(**settings: Any) -> dict[str, Any]:
    return {"merge": settings}


@pytest.fixture
def open_recipe(tmp_path: Path, tiny_model: Path) -> Any:
    """Opens a recipe of the given stages on `chats` and `more`, 20 conversations each."""
    datasets = {}
    for name in ("chats", "more"):
        rows = [
            {"prompt": f"What is {name} {number}?", "completion": f"It is {number}."}
            for number in range(20)
        ]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        datasets[name] = {"source": str(file)}

    def build(*stages: Any) -> Pipeline:
        recipe = {
            "name": "test",
            "model": str(tiny_model),
            "datasets": datasets,
            "stages": list(stages),
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return open_pipeline(file, [], Store(tmp_path / "store"))

    return build


def problems_of(open_recipe: Any, *stages: Any) -> str:
    with pytest.raises(RecipeError) as error:
        open_recipe(*stages)
    return str(error.value)


def test_a_merge_of_several_reads_them_and_the_held_out_rows_of_each(open_recipe: Any) -> None:
    pipeline = open_recipe(
        sft("one"), sft("two", "more", **FULL), merge(method="linear", models=BOTH), "evaluate"
    )
    step = pipeline.step("merge")
    assert step.kind == "model"
    assert step.inputs == {
        "model:one": pipeline.step("one").output,
        "model:two": pipeline.step("two").output,
        "prompts:chats": pipeline.step("prepare-chats").output,
        "prompts:more": pipeline.step("prepare-more").output,
    }
    assert pipeline.step("evaluate").inputs["model"] == step.output


def test_changes_are_measured_from_the_last_model_that_all_come_from(open_recipe: Any) -> None:
    start = sft("start", **FULL)
    later = [sft("one", model="start"), sft("two", model="start", seed=1, **FULL)]
    ties = merge(method="ties", models=BOTH)
    pipeline = open_recipe(start, *later, ties)
    assert pipeline.step("merge").inputs["base"] == pipeline.step("start").output
    pipeline = open_recipe(start, *later, sft("three", seed=2), merge(**ties["merge"], name="m"))
    assert pipeline.step("m").inputs["base"] == pipeline.step("start").output
    three = merge(method="ties", models=[*BOTH, "three"])
    pipeline = open_recipe(start, *later, sft("three", seed=2), three)
    assert pipeline.step("merge").inputs["base"] == pipeline.step("start").inputs["model"]
    named = merge(method="dare_ties", models=BOTH, base="base")
    pipeline = open_recipe(start, *later, named)
    assert pipeline.step("merge").inputs["base"] == pipeline.step("start").inputs["model"]


def test_changes_are_never_measured_from_an_adapter(open_recipe: Any) -> None:
    folded = merge(name="folded", model="one")
    pipeline = open_recipe(sft("one"), folded, merge(method="ties", models=["one", "folded"]))
    assert pipeline.step("merge").inputs["base"] == pipeline.step("one").inputs["model"]


def test_a_merge_may_be_merged_again(open_recipe: Any) -> None:
    first = merge(method="linear", models=BOTH, name="first")
    again = merge(method="ties", models=["first", "three"])
    pipeline = open_recipe(sft("one"), sft("two", "more"), first, sft("three", seed=1), again)
    step = pipeline.step("merge")
    assert step.inputs["base"] == pipeline.step("one").inputs["model"]
    assert {name for name in step.inputs if name.startswith("prompts:")} == {
        *("prompts:chats", "prompts:more")
    }


def test_adapters_of_one_base_become_an_adapter_that_is_used_like_any_other(
    open_recipe: Any,
) -> None:
    combined = merge(method="cat", models=BOTH, into="adapter", name="both")
    pipeline = open_recipe(sft("one"), sft("two", "more"), combined, "merge")
    assert pipeline.step("both").kind == "adapter"
    assert pipeline.step("both").inputs["model"] == pipeline.step("one").inputs["model"]
    assert pipeline.step("merge").inputs["model"] == pipeline.step("both").output
    assert pipeline.step("merge").kind == "model"


def test_folding_knows_how_the_base_was_held_in_training(open_recipe: Any) -> None:
    pipeline = open_recipe(sft("one", quantization={"type": "fp4"}), "merge")
    config = pipeline.step("merge").config
    assert isinstance(config, MergeConfig)
    assert config.quantization == Quantization(type="fp4")
    plain = open_recipe(sft("one"), "merge").step("merge").config
    assert plain.quantization is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": BOTH}, "`models` need a `method`: one of linear, slerp, ties"),
        ({"method": "ties"}, "`method` is for merging several models: name them as `models`"),
        ({"models": BOTH, "method": "linear", "model": "one"}, "remove one"),
        ({"models": ["one"], "method": "linear"}, "name at least two"),
        ({"models": ["one", "one"], "method": "linear"}, "`one` occurs twice"),
        (
            {"models": [*BOTH, "base"], "method": "slerp"},
            "slerp lies between two models, and `models` names 3",
        ),
        (
            {"models": [{"model": "one", "weight": 1}, "two"], "method": "ties"},
            "`two` has no `weight`: give every model one, or none",
        ),
        (
            {
                "models": [{"model": "one", "weight": 1}, {"model": "two", "weight": 1}],
                "method": "slerp",
            },
            "slerp has no weights: write `t`",
        ),
        ({"models": BOTH, "method": "linear", "t": 0.2}, "`t` belongs to `method: slerp`"),
        (
            {"models": [{"model": "one", "density": 0.1}, "two"], "method": "linear"},
            "`density` belongs to TIES and DARE",
        ),
        ({"models": BOTH, "method": "linear", "base": "base"}, "`base` belongs to TIES and DARE"),
        ({"models": BOTH, "method": "svd"}, "`svd` does not merge into a model"),
        (
            {"models": BOTH, "method": "slerp", "into": "adapter"},
            "`slerp` does not merge into an adapter; the methods that do are linear, svd, cat",
        ),
        (
            {
                "models": [{"model": "one", "density": 0.1}, "two"],
                "method": "ties",
                "into": "adapter",
            },
            "give every model the same `density`",
        ),
        ({"models": BOTH, "method": "ties", "rank": 4}, "`rank` belongs to the methods that end"),
        ({"models": [{"model": "one", "wieght": 1}], "method": "ties"}, "did you mean `weight`"),
        ({"models": ["one", "tow"], "method": "linear"}, "no stage before this one is `tow`"),
        ({"quantization": {}}, "is known from the stage that trained the adapter"),
        ({"weight": 0.5}, "`weight` belongs to `method: interpolate`: write it with that method"),
        (
            {"models": BOTH, "method": "linear", "weight": 0.5},
            "`weight` belongs to `method: interpolate`: write it beside each of `models`",
        ),
        (
            {"models": ["one"], "method": "interpolate"},
            "`interpolate` lies between one model and its base: write `model` and `base`",
        ),
        ({"method": "interpolate", "t": 0.2}, "`interpolate` takes `weight`, `model` and `base`"),
        ({"method": "interpolate", "into": "adapter"}, "`into` is for merging several models"),
        ({"method": "interpolate", "weight": 1.2}, "less than or equal to 1"),
        ({"method": "interpolate", "weight": -0.1}, "greater than or equal to 0"),
        ({"method": "interpolate", "model": "base"}, "no stage before it trains"),
        ({"method": "interpolate", "model": "tow"}, "no stage before this one is `tow`"),
        ({"method": "interpolate", "base": "one"}, "`one` leaves an adapter"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    open_recipe: Any, settings: dict[str, Any], message: str
) -> None:
    assert message in problems_of(open_recipe, sft("one"), sft("two", "more"), merge(**settings))


# Interpolation


def interpolate(**settings: Any) -> dict[str, Any]:
    return merge(method="interpolate", **settings)


def test_an_interpolation_reads_both_ends_and_the_rows_that_were_learned(open_recipe: Any) -> None:
    pipeline = open_recipe(sft("one"), interpolate(weight=0.7), "evaluate")
    step = pipeline.step("merge")
    assert step.kind == "model"
    assert step.inputs == {
        "model": pipeline.step("one").output,
        "base": pipeline.step("one").inputs["model"],
        "prompts:chats": pipeline.step("prepare-chats").output,
    }
    assert pipeline.step("evaluate").inputs["model"] == step.output


@pytest.mark.parametrize(
    ("stages", "base"),
    [
        ([sft("one", **FULL)], None),
        ([sft("one"), merge(name="folded")], None),
        ([sft("one", **FULL), sft("two", model="one", **FULL)], "one"),
        ([sft("one", **FULL), sft("two", model="one"), merge(name="folded")], "one"),
        ([sft("one"), sft("two", "more"), merge(name="both", method="linear", models=BOTH)], None),
        ([sft("one"), interpolate(name="first")], None),
        ([sft("one", **FULL), sft("two", model="one"), interpolate(name="x", base="base")], None),
    ],
    ids=["full", "folded", "second", "folded second", "several", "again", "again from another"],
)
def test_it_goes_back_towards_the_last_model_that_one_was_trained_from(
    open_recipe: Any, stages: list[Any], base: str | None
) -> None:
    pipeline = open_recipe(*stages, interpolate(name="last"))
    first = pipeline.step("one").inputs["model"]
    assert pipeline.step("last").inputs["base"] == (pipeline.step(base).output if base else first)


def test_a_base_may_be_named(open_recipe: Any) -> None:
    stages = (sft("one", **FULL), sft("two", model="one"), interpolate(base="base"))
    pipeline = open_recipe(*stages)
    assert pipeline.step("merge").inputs["base"] == pipeline.step("one").inputs["model"]
    text = problems_of(open_recipe, sft("one", **FULL), interpolate(base="one"))
    assert "model and base are the same, so nothing lies between them" in text


def test_what_is_no_part_of_the_weights_has_nothing_between(open_recipe: Any) -> None:
    text = problems_of(open_recipe, sft("one", adapter={"type": "prefix"}), interpolate())
    assert "the prefix adapter of `one` cannot become part of the weights" in text


def test_another_weight_is_another_merge_and_leaves_the_training_alone(
    open_recipe: Any, tmp_path: Path
) -> None:
    prints = set()
    for weight in (0.3, 0.7):
        pipeline = open_recipe(sft("one"), interpolate(weight=weight))
        done = made_up(pipeline, tmp_path / f"made-up-{weight}")
        prints.add(pipeline.bind(pipeline.step("merge"), done).fingerprint)
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("adapter", "kind"),
    [
        ({"type": "prefix"}, "prefix"),
        ({"type": "prompt"}, "prompt"),
        ({"type": "bottleneck"}, "bottleneck"),
    ],
)
def test_adapters_that_cannot_be_folded_in_are_refused(
    open_recipe: Any, adapter: dict[str, Any], kind: str
) -> None:
    text = problems_of(open_recipe, sft("one", adapter=adapter), "merge")
    assert f"the {kind} adapter of `one` cannot become part of the weights" in text
    assert "`evaluate` takes adapters as they are" in text
    several = merge(method="linear", models=["base", "one"])
    text = problems_of(open_recipe, sft("one", adapter=adapter), several)
    assert f"stages[1].merge.models[1].model: the {kind} adapter" in text


def test_a_base_that_is_merged_itself_is_refused(open_recipe: Any) -> None:
    ties = merge(method="ties", models=["base", "one"])
    text = problems_of(open_recipe, sft("one"), ties)
    assert "changes are measured from `base`, so it adds none itself" in text
    text = problems_of(open_recipe, sft("one"), sft("two"), merge(**ties["merge"], base="two"))
    assert "`two` leaves an adapter, and changes are measured from all weights" in text


def test_what_peft_cannot_combine_is_refused(open_recipe: Any) -> None:
    def text(*stages: Any, method: str = "ties") -> str:
        return problems_of(open_recipe, *stages, merge(method=method, models=BOTH, into="adapter"))

    assert "`two` is no adapter" in text(sft("one"), sft("two", **FULL))
    assert "`one` is not plain LoRA" in text(sft("one", adapter={"dora": True}), sft("two"))
    assert "`two` is not plain LoRA" in text(sft("one"), sft("two", adapter={"type": "ia3"}))
    start = sft("start", **FULL)
    assert "`one` and `two` were trained on different models" in text(
        start, sft("one", model="start"), sft("two")
    )
    ranks = (sft("one"), sft("two", adapter={"rank": 4}))
    assert "`ties` needs adapters of one rank, and these have 4 and 16" in text(*ranks)
    assert "write `method: svd`" in text(*ranks, method="linear")
    open_recipe(*ranks, merge(method="ties_svd", models=BOTH, into="adapter"))


def test_each_adapter_among_several_is_told_its_base(
    open_recipe: Any, tiny_model: Path, tmp_path: Path
) -> None:
    both = merge(method="cat", models=BOTH, into="adapter", name="both")
    pipeline = open_recipe(
        sft("start", **FULL),
        sft("one"),
        sft("two", "more"),
        sft("three", model="start"),
        both,
        merge(method="ties", models=["both", "three", "start"]),
    )
    done = made_up(pipeline, tmp_path / "made-up")
    inputs = pipeline.bind(pipeline.step("merge"), done).job("INFO").inputs
    assert {name: value.base for name, value in inputs.items() if value.kind == "adapter"} == {
        "model:both": str(tiny_model),
        "model:three": str(done["start"].path),
    }
    assert inputs["model:start"].path == str(done["start"].path)
    assert inputs["base"].path == str(tiny_model)
    combined = pipeline.bind(pipeline.step("both"), done).job("INFO").inputs
    assert combined["model"].path == combined["model:two"].base == str(tiny_model)


def test_another_base_under_the_same_adapters_is_another_merge(
    open_recipe: Any, tmp_path: Path
) -> None:
    stages = (sft("start", **FULL), sft("one", model="start"), sft("two", model="start"))
    pipeline = open_recipe(*stages, merge(method="linear", models=BOTH))
    done = made_up(pipeline, tmp_path / "made-up")
    other = made_up(pipeline, tmp_path / "other", {"start": "another model"})
    step = pipeline.step("merge")
    assert done["one"].digest == other["one"].digest
    assert pipeline.bind(step, done).fingerprint == pipeline.bind(step, done).fingerprint
    assert pipeline.bind(step, done).fingerprint != pipeline.bind(step, other).fingerprint


def made_up(
    pipeline: Pipeline, folder: Path, contents: dict[str, str] | None = None
) -> dict[str, Artifact]:
    """An artifact with some text in it for every step."""
    made = Made(folder)
    texts = {step.name: step.name for step in pipeline.steps} | (contents or {})

    def write(text: str) -> Any:
        return lambda output: (output / "text.txt").write_text(text)

    return {
        step.name: made.put(
            step.stage, step.kind, {}, write(texts[step.name]), config={"name": step.name}
        )
        for step in pipeline.steps
    }


@pytest.mark.slow
def test_two_fine_tunes_are_merged_and_combined_by_one_recipe(
    open_recipe: Any, tmp_path: Path
) -> None:
    ties = merge(name="ties", method="ties", models=BOTH)
    combined = merge(name="both", method="svd", models=BOTH, into="adapter")
    pipeline = open_recipe(sft("one"), sft("two", "more"), ties, combined, merge(name="folded"))
    store = Store(tmp_path / "store")
    done: dict[str, Artifact] = {}
    for step in pipeline.steps:
        done[step.name] = run_step(pipeline.bind(step, done), store, StageObserver()).artifact
    assert {name: done[name].kind for name in ("ties", "both", "folded")} == {
        **{"ties": "model", "both": "adapter", "folded": "model"}
    }
    headline = done["ties"].manifest.headline
    assert headline.startswith("ties of 2; perplexity on chats ")
    assert " on more " in headline
    inputs = done["ties"].manifest.inputs
    assert {name for name in inputs if inputs[name].kind == "adapter"} == {
        *("model:one", "model:two")
    }
