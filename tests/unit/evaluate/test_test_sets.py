"""Test sets from their rows to tasks and items, with a model that really answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.prepared import write_dataset
from posttrain.data.rows import Chat, Document, Message
from posttrain.data.sources import source_digest
from posttrain.errors import DataError
from posttrain.evaluate.sandbox import SandboxError, check_sandbox
from posttrain.evaluate.test_rows import load_test_sets
from posttrain.evaluate.test_sets import MeasuredTests, run_test_sets
from posttrain.events import EventReader, Progress, Warn
from posttrain.recipe.datasets import DatasetSpec
from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.stages.program import StageContext, StageInput, StageJob
from posttrain.store.files import write_json

QUESTIONS = [f"What is number {number}? {'Think. ' * (number % 4)}" for number in range(12)]

Ask = Callable[..., MeasuredTests]


@pytest.fixture(scope="module")
def model(tiny_model):
    import torch

    from posttrain.models import load_causal_lm

    found = load_causal_lm(StageInput(kind="model", path=str(tiny_model), digest=""), "float32")
    # With the head that it shares with its input it repeats the last token of the prompt.
    torch.manual_seed(0)
    found.lm_head.weight = torch.nn.Parameter(torch.randn_like(found.lm_head.weight))
    return found


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from posttrain.models import load_tokenizer

    return load_tokenizer(StageInput(kind="model", path=str(tiny_model), digest=""))


@pytest.fixture
def make_context(tmp_path):
    def make(inputs: dict[str, StageInput], **settings: Any) -> StageContext[EvaluateConfig]:
        folder = tmp_path / f"evaluate-{len(list(tmp_path.glob('evaluate-*')))}"
        (folder / "output").mkdir(parents=True)
        config = EvaluateConfig.model_validate({"stage": "evaluate", **settings})
        job = StageJob(
            stage="evaluate",
            name="evaluate",
            config=config.model_dump(mode="json"),
            inputs={name: value.model_dump() for name, value in inputs.items()},  # type: ignore[misc]
        )
        write_json(folder / "stage.json", job.model_dump())
        return StageContext(folder, EvaluateConfig)

    return make


def raw(path: Path, rows: list[dict[str, Any]]) -> StageInput:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DatasetSpec(source=str(path))
    return StageInput(
        kind="source", path=str(path), digest=source_digest(spec), spec=spec.model_dump(mode="json")
    )


def pairs(references: list[str]) -> list[dict[str, Any]]:
    return [
        {"prompt": question, "completion": reference}
        for question, reference in zip(QUESTIONS, references, strict=False)
    ]


def own_tests(metrics: list[Any], **settings: Any) -> list[dict[str, Any]]:
    return [{"dataset": "own", "metrics": metrics, "max_new_tokens": 8, **settings}]


def warnings_of(context: StageContext[EvaluateConfig]) -> list[str]:
    events = EventReader(context.stage_dir / "events.jsonl").read()
    return [event.message for event in events if isinstance(event, Warn)]


@pytest.fixture
def said(make_context, model, tokenizer, tmp_path) -> list[str]:
    """What the model answers to `QUESTIONS`."""
    source = raw(tmp_path / "any.jsonl", pairs(["x"] * len(QUESTIONS)))
    context = make_context({"tests:own": source}, test_sets=own_tests(["exact_match"]))
    answers = [item.answer for item in run_test_sets(context, model, tokenizer).items]
    assert all(answers)
    return answers


def test_answers_are_scored_by_every_metric(make_context, model, tokenizer, tmp_path, said):
    references = [*said[:6], *["something else"] * 6]
    source = raw(tmp_path / "own.jsonl", pairs(references))
    metrics = ["exact_match", "rouge_l", "bleu", "chrf", {"json": None}]
    context = make_context({"tests:own": source}, test_sets=own_tests(metrics))
    found = run_test_sets(context, model, tokenizer)

    names = ["own:exact_match", "own:rouge_l", "own:bleu", "own:chrf", "own:json"]
    assert [result.task for result in found.results] == names
    assert found.results[0].value == 0.5
    assert found.results[0].n == 12
    assert found.results[0].standard_error == pytest.approx((0.25 / 11) ** 0.5)
    assert all(result.higher_is_better and 0 <= result.value <= 1 for result in found.results)
    assert found.results[2].metrics.keys() == {"bleu", "corpus_bleu", "cut_off"}

    exact = [item for item in found.items if item.task == "own:exact_match"]
    assert [item.value for item in exact] == [1] * 6 + [0] * 6
    assert [item.item_id for item in exact] == list(range(12))
    assert len({item.item_digest for item in exact}) == 12
    first = exact[0]
    assert (first.question, first.target, first.answer) == (QUESTIONS[0], said[0], said[0])
    assert (first.metric, first.group) == ("exact_match", "own:exact_match")
    assert first.metrics["exact_match"] == first.metrics["rouge_l"] == first.metrics["bleu"] == 1
    assert len(found.items) == 5 * 12


def test_answers_do_not_depend_on_the_size_of_batches(
    make_context, model, tokenizer, tmp_path, said
):
    source = raw(tmp_path / "own.jsonl", pairs(["x"] * 12))
    context = make_context({"tests:own": source}, test_sets=own_tests(["bleu"]), batch_size=1)
    assert [item.answer for item in run_test_sets(context, model, tokenizer).items] == said


def test_progress_is_told_in_answers(make_context, model, tokenizer, tmp_path):
    source = raw(tmp_path / "own.jsonl", pairs(["x"] * 5))
    context = make_context({"tests:own": source}, test_sets=own_tests(["bleu"]), batch_size=2)
    run_test_sets(context, model, tokenizer)
    events = list(EventReader(context.stage_dir / "events.jsonl").read())
    told = [event for event in events if isinstance(event, Progress) and event.unit == "answer"]
    assert (told[-1].done, told[-1].total) == (5, 5)


def test_the_last_answer_of_a_chat_is_the_reference(make_context, tmp_path):
    def turns(*said: tuple[str, str]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": content} for role, content in said]}

    rows = [
        turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        turns(("system", "s"), ("user", "e"), ("assistant", "f"), ("user", "g")),
    ]
    source = raw(tmp_path / "own.jsonl", rows)
    context = make_context({"tests:own": source}, test_sets=own_tests(["bleu"]))
    first, second = load_test_sets(context)[0].questions
    assert [turn.content for turn in first.prompt] == ["a", "b", "c"]
    assert first.reference == "d"
    assert [turn.content for turn in second.prompt] == ["s", "e"]
    assert second.reference == "f"


# Which rows are asked


def asked(context: StageContext[EvaluateConfig]) -> set[str]:
    return {question.reference for question in load_test_sets(context)[0].questions}


def test_the_rows_drawn_depend_on_the_seed_and_not_on_their_order(make_context, tmp_path):
    rows = pairs([f"answer {number}" for number in range(12)])
    source = raw(tmp_path / "one.jsonl", rows)
    turned = raw(tmp_path / "two.jsonl", rows[::-1])
    tests = own_tests(["bleu"], limit=5)
    drawn = asked(make_context({"tests:own": source}, test_sets=tests))
    assert len(drawn) == 5
    assert asked(make_context({"tests:own": turned}, test_sets=tests)) == drawn
    assert asked(make_context({"tests:own": source}, test_sets=tests, seed=1)) != drawn
    more = own_tests(["bleu"], limit=8)
    assert asked(make_context({"tests:own": source}, test_sets=more)) > drawn


def chat(number: int, question: str, *, system: str = "") -> Chat:
    first = (Message("system", system),) if system else ()
    turns = (*first, Message("user", question), Message("assistant", f"answer {number}"))
    return Chat(id=f"{number:016x}", file="f", row=number + 1, messages=turns)


def prepared(folder: Path, train: list[Chat], test: list[Chat]) -> StageInput:
    write_dataset(folder, "chats", {"train": train, "validation": train[:1], "test": test})
    return StageInput(kind="dataset", path=str(folder), digest=folder.name)


def test_of_a_prepared_dataset_the_held_out_rows_are_asked(make_context, tmp_path):
    held_out = [chat(number, QUESTIONS[number]) for number in range(3)]
    source = prepared(tmp_path / "prepared", [chat(9, "other")], held_out)
    context = make_context({"tests:own": source}, test_sets=own_tests(["bleu"]))
    assert asked(context) == {"answer 0", "answer 1", "answer 2"}
    assert warnings_of(context) == []


def test_rows_that_were_trained_on_are_left_out_and_counted(make_context, tmp_path):
    rows = pairs([f"answer {number}" for number in range(4)])
    trained = [chat(7, f" {QUESTIONS[1]}\n", system="Be brief."), chat(8, "other")]
    inputs = {
        "tests:own": raw(tmp_path / "own.jsonl", rows),
        "dataset": prepared(tmp_path / "prepared", trained, []),
    }
    context = make_context(inputs, test_sets=own_tests(["bleu"]), dataset="chats")
    assert asked(context) == {"answer 0", "answer 2", "answer 3"}
    assert warnings_of(context) == ["own: 1 of 4 test rows were trained on and are left out"]


def test_rows_of_which_all_were_trained_on_are_refused(make_context, tmp_path):
    inputs = {
        "tests:own": raw(tmp_path / "own.jsonl", pairs(["x"])),
        "dataset": prepared(tmp_path / "prepared", [chat(7, QUESTIONS[0])], []),
    }
    context = make_context(inputs, test_sets=own_tests(["bleu"]))
    with pytest.raises(DataError, match="all 1 rows of the test set `own` were trained on"):
        load_test_sets(context)


def test_files_that_changed_since_the_plan_are_refused(make_context, tmp_path):
    source = raw(tmp_path / "own.jsonl", pairs(["x"]))
    raw(tmp_path / "own.jsonl", pairs(["y"]))
    context = make_context({"tests:own": source}, test_sets=own_tests(["bleu"]))
    with pytest.raises(DataError, match="changed since the run was planned"):
        load_test_sets(context)


def test_documents_are_refused(make_context, tmp_path):
    source = raw(tmp_path / "own.jsonl", [{"text": "Running text."}])
    context = make_context({"tests:own": source}, test_sets=own_tests(["bleu"]))
    with pytest.raises(DataError, match="`own` holds documents"):
        load_test_sets(context)


def test_prepared_documents_are_refused(make_context, tmp_path):
    rows = [Document(id=f"{n}", file="f", row=n, text=f"Text {n}") for n in range(2)]
    write_dataset(tmp_path / "docs", "documents", {"train": rows[:1], "test": rows[1:]})
    source = StageInput(kind="dataset", path=str(tmp_path / "docs"), digest="d")
    context = make_context({"tests:own": source}, test_sets=own_tests(["bleu"]))
    with pytest.raises(DataError, match="`own` holds documents"):
        load_test_sets(context)


def test_a_reference_that_a_metric_cannot_use_is_named_with_its_row(make_context, tmp_path):
    source = raw(tmp_path / "own.jsonl", pairs(["bug", "crash"]))
    metrics = [{"labels": {"choices": ["bug", "feature"]}}]
    context = make_context({"tests:own": source}, test_sets=own_tests(metrics))
    with pytest.raises(DataError, match=r"own.jsonl:2: the reference names none of the choices"):
        load_test_sets(context)


def test_the_same_task_twice_is_refused(make_context, tmp_path):
    source = raw(tmp_path / "own.jsonl", pairs(["x"]))
    twice = [*own_tests(["bleu"]), *own_tests(["bleu"])]
    context = make_context({"tests:own": source}, test_sets=twice)
    with pytest.raises(DataError, match="`own:bleu` is asked for twice"):
        load_test_sets(context)


# Limits of the model


def test_prompts_that_the_model_cannot_read_count_as_wrong(
    make_context, model, tokenizer, tmp_path
):
    rows = [*pairs(["x"]), {"prompt": "long " * 2000, "completion": "y"}]
    source = raw(tmp_path / "own.jsonl", rows)
    metrics = [{"regex": {"pattern": ".*"}}]
    context = make_context({"tests:own": source}, test_sets=own_tests(metrics))
    found = run_test_sets(context, model, tokenizer)
    assert [item.value for item in found.items] == [1, 0]
    assert found.results[0].metrics["too_long"] == 0.5
    assert any("1 of 2 prompts are longer than the 504 tokens" in w for w in warnings_of(context))


def test_answers_longer_than_the_model_reads_are_refused(make_context, model, tokenizer, tmp_path):
    source = raw(tmp_path / "own.jsonl", pairs(["x"]))
    context = make_context({"tests:own": source}, test_sets=own_tests(["bleu"], max_new_tokens=512))
    with pytest.raises(DataError, match="lower `max_new_tokens`"):
        run_test_sets(context, model, tokenizer)


def test_answers_without_an_end_are_counted(make_context, model, tokenizer, tmp_path):
    source = raw(tmp_path / "own.jsonl", pairs(["x"] * 3))
    context = make_context({"tests:own": source}, test_sets=own_tests(["bleu"], max_new_tokens=2))
    found = run_test_sets(context, model, tokenizer)
    assert found.results[0].metrics["cut_off"] == 1
    assert any("3 of 3 answers" in warning for warning in warnings_of(context))


# What two evaluations must have in common


def test_settings_say_what_was_asked(make_context, model, tokenizer, tmp_path):
    rows = pairs(["x"] * 4)

    def settings_of(name: str, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
        source = raw(tmp_path / name, rows)
        context = make_context({"tests:own": source}, test_sets=own_tests(["bleu"], **settings))
        (found,) = run_test_sets(context, model, tokenizer).settings
        return found

    one = settings_of("one.jsonl", rows)
    assert one["asked"] == 4
    assert one["versions"].keys() == {"sacrebleu"}
    assert settings_of("same.jsonl", rows) == one
    assert settings_of("more.jsonl", [*rows, *pairs(["y"])[:1]])["rows"] != one["rows"]
    assert settings_of("less.jsonl", rows, limit=2)["rows"] != one["rows"]
    json.dumps(one)


def test_everything_is_the_same_the_second_time(make_context, model, tokenizer, tmp_path):
    source = raw(tmp_path / "own.jsonl", pairs(["x"] * 6))
    tests = own_tests(["exact_match", "rouge1"], limit=4)

    def run() -> MeasuredTests:
        return run_test_sets(make_context({"tests:own": source}, test_sets=tests), model, tokenizer)

    assert run() == run()


def test_code_is_sampled_and_run(make_context, model, tokenizer, tmp_path):
    try:
        check_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    source = raw(tmp_path / "own.jsonl", pairs(["assert f(1) == 2", "pass"]))
    # Whatever this model writes is no Python: so an answer that leaves the tests to themselves.
    metrics = [{"code": {"k": 2, "samples": 3, "timeout_s": 2}}, "bleu"]
    tests = own_tests(metrics, run_code=True)
    found = run_test_sets(make_context({"tests:own": source}, test_sets=tests), model, tokenizer)
    code, bleu = found.results
    assert (code.task, code.n, bleu.n) == ("own:pass@2", 2, 2)
    assert code.value == 0
    assert {"pass@2", "pass@2_passed", "timeouts", "cut_off"} == code.metrics.keys()
    again = run_test_sets(make_context({"tests:own": source}, test_sets=tests), model, tokenizer)
    assert again.items == found.items
    assert "python" in found.settings[0]["versions"]


def test_without_test_sets_nothing_is_measured(make_context, model, tokenizer):
    assert run_test_sets(make_context({}), model, tokenizer) == MeasuredTests((), (), ())
