"""Laying out a recipe: what is added, what cannot follow what, and how that reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.data.prepared import PreparedDataset
from posttrain.errors import RecipeError
from posttrain.execute import Outcome, StageObserver, run_step
from posttrain.opening import open_pipeline
from posttrain.pipeline import Pipeline
from posttrain.store import Store

CHAT = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}]}
PAIR = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}


def mix(*datasets: str, name: str = "blend", **settings: Any) -> dict[str, Any]:
    """A stage that mixes these datasets by their sizes."""
    return {"mix": {"name": name, "sources": [{"dataset": d} for d in datasets], **settings}}


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


def test_stages_may_start_from_the_base_side_by_side(open_recipe: Any) -> None:
    pipeline = open_recipe(
        {"sft": {"dataset": "chats", "name": "one", "model": "base"}},
        {"sft": {"dataset": "chats", "name": "two", "model": "base", "seed": 1}},
    )
    assert pipeline.step("one").inputs["model"] == pipeline.step("two").inputs["model"]


def test_documents_are_read_before_chats_with_general_text_among_them(
    open_recipe: Any, tmp_path: Path
) -> None:
    for name in ("manuals", "general"):
        lines = [{"text": f"{name} {number}"} for number in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (tmp_path / "chats.jsonl").write_text((json.dumps(CHAT) + "\n") * 2)
    names = ("manuals", "general", "chats")
    pipeline = open_recipe(
        {"pretrain": {"dataset": "manuals", "replay": {"dataset": "general", "fraction": 0.2}}},
        {"sft": {"dataset": "chats"}},
        datasets={name: {"source": str(tmp_path / f"{name}.jsonl")} for name in names},
    )
    pretrain = pipeline.step("pretrain")
    assert pretrain.inputs["dataset"] == pipeline.step("manuals-with-general").output
    assert pretrain.kind == "model", "all weights, unless an adapter is asked for"
    assert pipeline.step("sft").inputs["model"] == pretrain.output


def test_chats_are_no_documents(open_recipe: Any) -> None:
    with pytest.raises(RecipeError, match="documents"):
        open_recipe({"pretrain": {"dataset": "chats"}})


@pytest.fixture
def two_chats(tmp_path: Path) -> dict[str, Any]:
    """Datasets `chats` and `more` of 20 conversations each."""
    for name in ("chats", "more"):
        rows = [
            {"prompt": f"What is {name} {number}?", "completion": f"It is {number}."}
            for number in range(20)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: {"source": str(tmp_path / f"{name}.jsonl")} for name in ("chats", "more")}


def test_a_mix_is_a_dataset_for_later_stages(open_recipe: Any, two_chats: dict[str, Any]) -> None:
    pipeline = open_recipe(
        mix("chats", "more"), {"sft": {"dataset": "blend"}}, "merge", "evaluate", datasets=two_chats
    )
    assert [step.name for step in pipeline.steps] == [
        *("preflight", "preflight-2", "prepare-chats", "prepare-more", "blend", "evaluate-base"),
        *("sft", "merge", "evaluate"),
    ]
    blend = pipeline.step("blend").output
    for name, key in (("sft", "dataset"), ("merge", "prompts"), ("evaluate", "dataset")):
        assert pipeline.step(name).inputs[key] == blend


def test_our_questions_fit_a_mix_with_rows_about_python(
    open_recipe: Any, two_chats: dict[str, Any]
) -> None:
    datasets = {**two_chats, "docs": {"source": "builtin:python-docs/chats"}}
    asked = {"evaluate": {"tasks": ["python_docs_trained"]}}
    pipeline = open_recipe(
        mix("chats", "docs"), {"sft": {"dataset": "blend"}}, asked, datasets=datasets
    )
    assert pipeline.step("evaluate").inputs["dataset"] == pipeline.step("blend").output


def test_a_mix_may_be_mixed_again(open_recipe: Any, two_chats: dict[str, Any]) -> None:
    again = mix("blend", name="again", replay={"dataset": "more", "fraction": 0.1})
    pipeline = open_recipe(mix("chats"), again, datasets=two_chats)
    assert pipeline.step("again").waits_for() == {"blend", "prepare-more"}
    assert pipeline.recipe.made_of("again") == ("chats", "more")


def test_a_mix_of_a_recipe_runs_is_reused_and_says_what_it_took(
    open_recipe: Any, two_chats: dict[str, Any], tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")

    def run(**settings: Any) -> dict[str, Outcome]:
        pipeline = open_recipe(mix("chats", "more", **settings), datasets=two_chats)
        done: dict[str, Outcome] = {}
        for step in pipeline.steps:
            artifacts = {name: outcome.artifact for name, outcome in done.items()}
            done[step.name] = run_step(pipeline.bind(step, artifacts), store, StageObserver())
        return done

    first = run()
    blend = first["blend"].artifact
    dataset = PreparedDataset.open(blend.path)
    assert sum(dataset.sizes.values()) == len(dataset.ledger()) == 40
    sources = (first["prepare-chats"], first["prepare-more"])
    prepared = {line.id for made in sources for line in
                PreparedDataset.open(made.artifact.path).ledger()}  # fmt: skip
    assert {line.id for line in dataset.ledger()} == prepared
    assert blend.manifest.headline.startswith(f"{dataset.sizes['train']} train + ")
    assert blend.manifest.metrics["rows_train_chats"] > 0
    assert (blend.path / "report.json").exists()
    assert run(name="other")["other"].status == "reused"
    assert run(seed=1)["blend"].status == "ran"


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
        "    name `tasks`, `test_sets`, or a `dataset` for perplexity",
    ),
    "an unknown dataset": (
        [{"sft": {"dataset": "chat"}}],
        "stages[0].sft.dataset: there is no dataset `chat`\n"
        "    add it under `datasets`; the recipe has: chats, pairs",
    ),
    "an unknown stage": (
        [SFT, {"merge": {"model": "stf"}}],
        "stages[1].merge.model: no stage before this one is `stf`\n"
        "    stages with a model: base, sft",
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
    "mixing two kinds of rows": (
        [mix("chats", "pairs")],
        "stages[0].mix: `chats` holds chats and `pairs` holds preferences\n"
        "    mix datasets of one kind, and write a mix for each kind",
    ),
    "mixing the wrong rows": (
        [mix("pairs"), {"sft": {"dataset": "blend"}}],
        "datasets.pairs.format: its rows are preferences, but the stage that uses it needs chats",
    ),
    "mixing what is not there": (
        [mix("chats", "cats")],
        "stages[0].mix: there is no dataset `cats`\n"
        "    add it under `datasets`; the recipe has: chats, pairs",
    ),
    "mixing too late": (
        [{"sft": {"dataset": "blend"}}, mix("chats")],
        "stages[0].sft.dataset: `blend` is mixed by a later stage\n    move that stage up",
    ),
    "a mix with a dataset's name": (
        [mix("chats", name="pairs")],
        "stages[0].mix.name: there is a dataset `pairs` already\n"
        "    give the mix a name of its own",
    ),
    "two mixes of one name": (
        [mix("chats"), mix("chats")],
        "stages[1].mix.name: there is a dataset `blend` already\n"
        "    give the mix a name of its own",
    ),
    "preparing too late for a mix": (
        [mix("chats"), {"prepare": {"dataset": "chats"}}],
        "stages[0].mix: `chats` is prepared by a later stage\n    move that stage up",
    ),
    "our questions on a mix of other rows": (
        [mix("chats"), {"sft": {"dataset": "blend"}},
         {"evaluate": {"tasks": ["python_docs_trained"]}}],
        "stages[2].evaluate.tasks: `python_docs_trained` asks about Python objects, and `blend` "
        "has none",
    ),
    "our questions on other rows": (
        [SFT, {"evaluate": {"tasks": ["python_docs_trained"]}}],
        "stages[1].evaluate.tasks: `python_docs_trained` asks about Python objects, and `chats` "
        "has none\n    use it with a dataset of source builtin:python-docs/chats",
    ),
    "rules for documents on chats": (
        [{"prepare": {"dataset": "chats", "document_quality": {}}}],
        "stages[0].prepare.document_quality: these rules are for documents, and `chats` holds "
        "chats\n    use `answer_quality`",
    ),
    "a dataset against itself": (
        [{"prepare": {"dataset": "chats", "near_dedup": {"against": ["chats"]}}}],
        "stages[0].prepare.near_dedup.against: `chats` is the dataset itself",
    ),
    "against what is not there": (
        [{"prepare": {"dataset": "chats", "exact_dedup": {"against": ["cats"]}}}],
        "stages[0].prepare.exact_dedup.against: there is no dataset `cats`",
    ),
    "a test set that is not there": (
        [{"prepare": {"dataset": "chats", "split": {"test_dataset": "cats"}}}],
        "stages[0].prepare.split.test_dataset: there is no dataset `cats`",
    ),
    "keeping our own questions out": (
        [{"prepare": {"dataset": "chats", "decontaminate": ["python_docs_held_out"]}}],
        "stages[0].prepare.decontaminate: `python_docs_held_out` is made from the rows of the "
        "dataset, so it cannot be kept out\n    leave it out",
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


BENCHMARK = """\
task: trivia
dataset_path: json
dataset_kwargs: {data_files: {test: TRIVIA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
QUESTION = "which harbour did the whaling fleet of the northern islands leave in the year of ice"


@pytest.fixture
def trivia(tmp_path: Path) -> Path:
    """A folder with a benchmark of two questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": QUESTION, "choices": ["Vardo", "Tromso"], "answer": 0},
        {"question": "who " + QUESTION[5:], "choices": ["nobody", "all"], "answer": 1},
    ]
    (folder / "trivia.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = BENCHMARK.replace("TRIVIA", str(folder / "trivia.jsonl"))
    (folder / "trivia.yaml").write_text(text)
    return folder


def chats_about(*prompts: str) -> str:
    rows = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": f"{p}!"}]}
        for p in prompts
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_rows_that_give_away_the_recipes_benchmarks_are_dropped(
    open_recipe: Any, trivia: Path, tmp_path: Path
) -> None:
    """The benchmarks of `evaluate` are kept out without being named; the index is made once."""
    evaluate = {"evaluate": {"tasks": ["trivia"], "task_folders": [str(trivia)]}}
    more = tmp_path / "more.jsonl"
    more.write_text(chats_about("one", "two", "three", f"Tell me, {QUESTION.upper()}?"))
    datasets = {"more": {"source": str(more)}, "chats": {"source": str(tmp_path / "chats.jsonl")}}
    stages = [mix("more", "chats"), {"sft": {"dataset": "blend"}}, evaluate]
    (tmp_path / "chats.jsonl").write_text(chats_about("four", "five", "six"))
    pipeline = open_recipe(*stages, datasets=datasets)
    names = [step.name for step in pipeline.steps]
    assert names.count("contamination") == 1
    assert pipeline.step("prepare-more").waits_for() == {"contamination"}
    done: dict[str, Any] = {}
    for name in ("contamination", "prepare-more"):
        bound = pipeline.bind(pipeline.step(name), done)
        outcome = run_step(bound, Store(tmp_path / "store"), StageObserver())
        done[name] = outcome.artifact
    assert done["contamination"].manifest.headline == "trivia 2 items"
    line = PreparedDataset.open(done["prepare-more"].path).ledger()[3]
    assert (line.operation, line.reason) == ("decontaminate", "in trivia")
    assert line.detail is not None
    assert "whaling fleet" in line.detail.lower()

    # Another benchmark that drops no other row changes the index and the report, no training.
    (trivia / "trivia.jsonl").write_text(
        json.dumps({"question": QUESTION + " again", "choices": ["a", "b"], "answer": 1}) + "\n"
    )
    again = open_recipe(*stages, datasets=datasets)
    first = done["prepare-more"].digest
    for name in ("contamination", "prepare-more"):
        bound = again.bind(again.step(name), done)
        outcome = run_step(bound, Store(tmp_path / "store"), StageObserver())
        assert outcome.status == "ran"
        done[name] = outcome.artifact
    assert done["prepare-more"].digest == first


def test_without_benchmarks_nothing_is_indexed(open_recipe: Any) -> None:
    pipeline = open_recipe(SFT, {"evaluate": {"dataset": "chats"}})
    assert "contamination" not in [step.name for step in pipeline.steps]
    assert pipeline.step("prepare-chats").config.decontaminate is None


def test_other_datasets_and_a_test_set_are_inputs_of_prepare(
    open_recipe: Any, tmp_path: Path
) -> None:
    (tmp_path / "chats.jsonl").write_text(chats_about("one", "two", "three"))
    more = tmp_path / "more.jsonl"
    more.write_text(chats_about("one", "four", "five", "six"))
    exam = tmp_path / "exam.jsonl"
    exam.write_text(chats_about("six", "seven"))
    datasets = {
        "chats": {"source": str(tmp_path / "chats.jsonl")},
        "more": {"source": str(more)},
        "exam": {"source": str(exam)},
    }
    settings = {"exact_dedup": {"against": ["chats"]}, "split": {"test_dataset": "exam"}}
    pipeline = open_recipe({"prepare": {"dataset": "more", **settings}}, datasets=datasets)
    assert [step.name for step in pipeline.steps] == ["prepare-chats", "prepare-more"]
    done: dict[str, Any] = {}
    for step in pipeline.steps:
        bound = pipeline.bind(step, done)
        done[step.name] = run_step(bound, Store(tmp_path / "store"), StageObserver()).artifact
    dataset = PreparedDataset.open(done["prepare-more"].path)
    assert {line.reason for line in dataset.ledger()} == {"duplicate", "repeats the test set", None}
    assert dataset.sizes == {"train": 1, "validation": 1, "test": 2}
