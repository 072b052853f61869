from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.data.mixing import mix_datasets
from posttrain.data.prepared import write_dataset
from posttrain.data.python_docs import choices
from posttrain.data.rows import Chat, Document, Message, Preference
from posttrain.errors import DataError
from posttrain.evaluate.items import read_items, read_perplexity
from posttrain.evaluate.language_models import check_backend
from posttrain.evaluate.results import EvaluationResults
from posttrain.events import EventReader, EventWriter, Warn
from posttrain.recipe.evaluate import EvaluateConfig, Samples
from posttrain.recipe.mix import MixConfig, MixSource
from posttrain.stages.evaluate import main
from posttrain.stages.program import StageInput

OUTPUT = ("results.json", "items.parquet", "perplexity.parquet", "samples.json")


def write_rows(folder: Path, family: str, train: list, validation: list) -> Path:
    write_dataset(folder, family, {"train": train, "validation": validation})  # type: ignore[arg-type]
    return folder


def chat(number: int, subject: str) -> Chat:
    turns = (Message("user", f"What is {subject}?"), Message("assistant", f"Number {number}."))
    return Chat(id=f"id{number}", file="f", row=number, subject=subject, messages=turns)


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    subjects = [item.subject for item in choices()[:30]]
    rows = [chat(number, subject) for number, subject in enumerate(subjects)]
    return write_rows(tmp_path_factory.mktemp("chats"), "chats", rows[:18], rows[18:])


@pytest.fixture
def evaluate(make_context, tiny_model):
    def evaluate(about: Path | None, others: dict[str, Path] | None = None, **settings: object):
        inputs = {"model": ("model", tiny_model)}
        if about is not None:
            inputs["dataset"] = ("dataset", about)
        for name, folder in (others or {}).items():
            inputs[f"dataset:{name}"] = ("dataset", folder)
        context = make_context(EvaluateConfig(**settings), inputs)  # type: ignore[arg-type]
        return context, main(context)

    return evaluate


def test_everything_at_once(evaluate, chats):
    tasks = ("python_docs_held_out", "python_docs_trained")
    context, result = evaluate(
        chats, tasks=tasks, limit=20, samples=Samples(count=2, max_new_tokens=4)
    )
    results = EvaluationResults.load(context.output)
    held_out, trained = results.tasks
    assert (held_out.task, held_out.n, trained.task, trained.n) == (tasks[0], 20, tasks[1], 18)
    assert results.settings_digest == results.settings.digest
    assert results.perplexity is not None
    assert results.perplexity.rows == len(read_perplexity(context.output)) == 12
    assert len(read_items(context.output)) == 38
    samples = json.loads((context.output / "samples.json").read_bytes())
    assert len(samples) == 2
    assert result.metrics == {
        "python_docs_held_out": held_out.value,
        "python_docs_trained": trained.value,
        "perplexity": results.perplexity.perplexity,
        "bits_per_byte": results.perplexity.bits_per_byte,
    }
    assert result.headline.startswith("python_docs_held_out 0.")
    assert "perplexity" in result.headline


def test_the_same_inputs_give_the_same_bytes(evaluate, chats):
    settings = {"tasks": ("python_docs_held_out",), "limit": 6, "max_perplexity_rows": 4}
    first, _ = evaluate(chats, **settings)
    second, _ = evaluate(chats, **settings)
    for name in OUTPUT:
        assert (first.output / name).read_bytes() == (second.output / name).read_bytes(), name
    assert sorted(path.name for path in first.output.iterdir()) == sorted(OUTPUT)


def test_perplexity_alone_over_documents(evaluate, tmp_path):
    rows = [Document(id=f"{n}", file="f", row=n, text=f"Document {n}. " * 5) for n in range(6)]
    dataset = write_rows(tmp_path / "documents", "documents", rows[:2], rows[2:])
    context, _ = evaluate(dataset, max_perplexity_rows=3, samples=Samples(max_new_tokens=2))
    results = EvaluationResults.load(context.output)
    assert results.tasks == ()
    assert results.perplexity is not None
    assert results.perplexity.rows == 3
    assert read_items(context.output) == []


@pytest.fixture
def documents(tmp_path) -> Path:
    rows = [Document(id=f"{n}", file="f", row=n, text=f"Document {n}. " * 5) for n in range(6)]
    return write_rows(tmp_path / "documents", "documents", rows[:2], rows[2:])


def test_each_dataset_has_a_perplexity_of_its_own(evaluate, chats, documents):
    settings = {"samples": Samples(count=0), "max_perplexity_rows": 3}
    context, result = evaluate(chats, {"general": documents}, dataset="tickets", **settings)
    results = EvaluationResults.load(context.output)
    rows = read_perplexity(context.output)
    assert [row.dataset for row in rows] == ["tickets"] * 3 + ["general"] * 3
    general = results.other_perplexities["general"]
    assert results.perplexity is not None
    assert (results.perplexity.rows, general.rows) == (3, 3)
    # Answers of chats alone, documents whole.
    assert all(row.bytes <= len("Number 00.") for row in rows[:3])
    assert all(row.bytes > len("Document 0. " * 4) for row in rows[3:])
    assert result.metrics["perplexity_general"] == general.perplexity
    assert result.headline.endswith(f"perplexity on general {general.perplexity:,.0f}")
    # What one dataset gives does not depend on the others.
    for inputs in ((chats, {}), (None, {"general": documents})):
        alone, _ = evaluate(*inputs, dataset="tickets", **settings)
        assert read_perplexity(alone.output) == (rows[:3] if inputs[0] else rows[3:])


def test_no_dataset_but_others(evaluate, documents):
    context, _ = evaluate(None, {"general": documents}, samples=Samples(count=0))
    results = EvaluationResults.load(context.output)
    assert results.perplexity is None
    assert list(results.other_perplexities) == ["general"]


def test_rows_of_several_tasks_are_summed_up_by_task(evaluate, tmp_path):
    rows = [
        replace(chat(number, "x"), category=[None, "write", "sum"][number % 3])
        for number in range(12)
    ]
    dataset = write_rows(tmp_path / "tasks", "chats", rows[:3], rows[3:])
    results = EvaluationResults.load(evaluate(dataset, samples=Samples(count=0))[0].output)
    assert results.perplexity is not None
    assert {name: group.rows for name, group in results.perplexity.groups.items()} == {
        "(none)": 3,
        "sum": 3,
        "write": 3,
    }


def test_names_of_single_rows_are_no_tasks(evaluate, tmp_path):
    rows = [replace(chat(number, "x"), category=f"ticket {number}") for number in range(60)]
    dataset = write_rows(tmp_path / "tickets", "chats", rows[:2], rows[2:])
    results = EvaluationResults.load(evaluate(dataset, samples=Samples(count=0))[0].output)
    assert results.perplexity is not None
    assert results.perplexity.groups == {}


def test_rows_of_a_mix_are_summed_up_by_their_dataset(evaluate, chats, tmp_path):
    other = [replace(chat(number, f"y{number}"), id=f"o{number}") for number in range(100, 130)]
    folders = {"a": chats, "b": write_rows(tmp_path / "b", "chats", other[:20], other[20:])}
    config = MixConfig(name="ab", sources=(MixSource(dataset="a"), MixSource(dataset="b")))
    mix_datasets(config, folders, tmp_path / "mix", EventWriter(tmp_path / "e.jsonl"))
    context, _ = evaluate(tmp_path / "mix", samples=Samples(count=0))
    results = EvaluationResults.load(context.output)
    assert results.perplexity is not None
    assert set(results.perplexity.groups) == {"a", "b"}
    rows = read_perplexity(context.output)
    assert {row.group for row in rows if row.id.startswith("o")} == {"b"}


def test_rows_without_one_right_text_are_not_scored(evaluate, tmp_path):
    user, good, bad = (Message("user", "?"),), (Message("assistant", "a"),), ()
    rows = [
        Preference(id=f"{n}", file="f", row=n, prompt=user, chosen=good, rejected=bad)
        for n in range(2)
    ]
    dataset = write_rows(tmp_path / "pairs", "preferences", rows[:1], rows[1:])
    context, _ = evaluate(dataset)
    warnings = list(EventReader(context.stage_dir / "events.jsonl").read())
    assert any(isinstance(event, Warn) and "no perplexity" in event.message for event in warnings)
    assert EvaluationResults.load(context.output).perplexity is None


def test_settings_that_matter_change_the_digest(evaluate, chats):
    digests = {
        evaluate(chats, samples=Samples(count=0), **settings)[1].details["settings_digest"]
        for settings in ({}, {"max_perplexity_rows": 3}, {"seed": 1}, {"batch_size": 2})
    }
    assert len(digests) == 3  # the batch size does not matter


def test_nothing_to_measure_is_an_error(evaluate):
    with pytest.raises(DataError, match="nothing to measure"):
        evaluate(None)


def test_vllm_says_what_to_install_before_anything_is_loaded(evaluate, chats):
    with pytest.raises(DataError, match=r"`vllm` is not installed.*pip install vllm"):
        evaluate(chats, backend="vllm")


@pytest.mark.parametrize("config", [{"peft_type": "IA3"}, {"peft_type": "LORA", "r": 600}])
def test_vllm_refuses_adapters_that_it_does_not_know(tmp_path, monkeypatch, config):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = StageInput(kind="adapter", path=str(tmp_path), digest="", base="")
    with pytest.raises(DataError, match="plain LoRA adapters up to rank 512"):
        check_backend("vllm", adapter)


def test_who_answers_is_among_the_settings(evaluate, chats):
    digests = set()
    for backend in ("hf", "shared_prefixes"):
        context, _ = evaluate(chats, samples=Samples(count=0), backend=backend)
        results = EvaluationResults.load(context.output)
        assert results.settings.backend == backend
        digests.add(results.settings_digest)
    assert len(digests) == 2


def test_our_tasks_need_the_dataset(evaluate):
    with pytest.raises(DataError, match="name that dataset as `dataset`"):
        evaluate(None, tasks=("python_docs_trained",))


def test_a_missing_task_folder_is_an_error(evaluate, chats):
    with pytest.raises(DataError, match=r"task_folders: no folder at .*/nowhere"):
        evaluate(chats, task_folders=("nowhere",))
