from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.data.python_docs import choices
from posttrain.errors import DataError
from posttrain.evaluate.harness import Benchmarks, Measured, load_benchmarks, run_benchmarks
from posttrain.evaluate.python_docs_task import HELD_OUT, TASKS, TRAINED, write_tasks
from posttrain.events import EventReader, EventWriter, Progress
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.stages.program import StageInput


@pytest.fixture(scope="module")
def loaded(tiny_model):
    source = StageInput(kind="model", path=str(tiny_model), digest="")
    return load_causal_lm(source, "float32"), load_tokenizer(source)


@pytest.fixture
def ask(loaded, tmp_path):
    def ask(benchmarks: Benchmarks, batch_size: int = 4) -> Measured:
        ready = load_benchmarks(benchmarks)
        return run_benchmarks(*loaded, ready, batch_size, EventWriter(tmp_path / "e.jsonl"))

    return ask


@pytest.fixture(scope="module")
def quiz(tmp_path_factory) -> Path:
    """A folder with a task of a user's own, relative paths and all."""
    folder = tmp_path_factory.mktemp("quiz")
    rows = [
        {"question": f"{number} + 1 =", "choices": [str(number + 1), "no"], "answer": number % 2}
        for number in range(30)
    ]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "quiz.yaml").write_text(
        f"""
        task: quiz
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {folder}/quiz.jsonl}}}}
        test_split: test
        output_type: multiple_choice
        doc_to_text: "{{{{question}}}}"
        doc_to_choice: choices
        doc_to_target: answer
        metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
        metadata: {{version: 3}}
        """
    )
    return folder


def test_all_items_are_asked_without_a_limit(ask, quiz):
    measured = ask(Benchmarks(("quiz",), (quiz,)))
    [result] = measured.results
    assert (result.task, result.metric, result.n) == ("quiz", "acc", 30)
    assert result.value == pytest.approx(sum(item.value for item in measured.items) / 30)
    assert result.groups == {}
    assert [item.item_id for item in measured.items] == list(range(30))
    assert all(len(item.log_likelihoods) == 2 for item in measured.items)
    for item in measured.items:
        right = item.log_likelihoods.index(max(item.log_likelihoods)) == item.item_id % 2
        assert item.value == float(right)
    [settings] = measured.settings
    assert (settings.name, settings.version, settings.num_fewshot) == ("quiz", "3", 0)


def test_a_limit_draws_the_same_items_for_a_seed_and_not_the_first_ones(ask, quiz):
    limited = Benchmarks(("quiz",), (quiz,), limit=8)
    drawn, again, others = (
        [item.item_id for item in ask(benchmarks).items]
        for benchmarks in (limited, limited, replace(limited, seed=1))
    )
    assert drawn == again == sorted(drawn)
    assert len(set(drawn)) == 8
    assert drawn != list(range(8))
    assert drawn != others


def test_a_larger_limit_draws_the_same_items_and_more(ask, quiz):
    drawn = [
        {item.item_id for item in ask(Benchmarks(("quiz",), (quiz,), limit=limit, seed=1)).items}
        for limit in (5, 12, 20)
    ]
    assert [len(ids) for ids in drawn] == [5, 12, 20]
    assert drawn[0] < drawn[1] < drawn[2]


def test_an_item_says_what_was_asked_and_answered(ask, quiz):
    asked = Benchmarks(("quiz",), (quiz,), limit=9, num_fewshot=1, chat_template=True)
    for item in ask(asked).items:
        assert item.question == f"{item.item_id} + 1 ="
        assert item.choices == (str(item.item_id + 1), "no")
        assert item.target == item.choices[item.item_id % 2]
        assert (item.answer == item.target) == bool(item.value)


def write_task(folder: Path, **settings: object) -> Benchmarks:
    """The quiz, asked in another way."""
    rows = [
        {"question": f"{n} " * 3000 if n == 2 else f"{n}?", "choices": ["a" * n, "b"], "answer": 1}
        for n in range(1, 4)
    ]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "task.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        **settings,
    }
    (folder / "task.yaml").write_text(json.dumps(task))
    return Benchmarks(("task",), (folder,))


def scored_by(*metrics: str) -> list[dict[str, object]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics]


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_mutual_info"])
def test_the_answer_is_the_choice_that_the_metric_counts(ask, tmp_path, metric):
    measured = ask(write_task(tmp_path, metric_list=scored_by(metric)))
    assert [item.metric for item in measured.items] == [metric] * 3
    for item in measured.items:
        assert item.target == "b"
        assert item.answer in item.choices
        assert (item.answer == "b") == bool(item.value)


def test_a_long_question_keeps_its_beginning_and_its_end(ask, tmp_path):
    item = ask(write_task(tmp_path, metric_list=scored_by("acc"))).items[1]
    assert len(item.question) == 2000
    assert item.question.startswith("2 2 ")
    assert item.question.endswith(" 2")
    assert " [...] " in item.question


def test_a_written_answer_is_kept_as_written(ask, tmp_path):
    task = write_task(
        tmp_path,
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 5},
        metric_list=scored_by("exact_match"),
        filter_list=[{"name": "none", "filter": [{"function": "regex", "regex_pattern": "zzz"}]}],
    )
    measured = ask(task)
    assert [item.target for item in measured.items] == ["a", "aa", "aaa"]
    assert [item.choices for item in measured.items] == [()] * 3
    assert [item.log_likelihoods for item in measured.items] == [()] * 3
    # The filter finds nothing in it; the report shows it all the same.
    assert any(item.answer for item in measured.items)
    assert not any("[invalid]" in item.answer for item in measured.items)


def test_a_likely_text_is_the_answer_where_the_model_would_write_it(ask, tmp_path):
    task = write_task(
        tmp_path,
        output_type="loglikelihood",
        doc_to_choice=None,
        doc_to_target="{{choices[0]}}",
        metric_list=scored_by("acc"),
    )
    for item in ask(task).items:
        assert item.target == "a" * (item.item_id + 1)
        assert item.answer == (item.target if item.value else "")


def test_several_beginnings_of_one_end(ask, tmp_path):
    task = write_task(
        tmp_path,
        doc_to_text="1",
        doc_to_choice="{{['so ' ~ choices[0], 'so b']}}",
        doc_to_target="it is",
        metric_list=scored_by("acc"),
    )
    for item in ask(task).items:
        assert (item.question, item.target, item.choices[1]) == ("it is", "so b", "so b")
        assert (item.answer == "so b") == bool(item.value)


def test_a_drawn_item_has_the_content_of_its_number(ask, quiz):
    everything = {item.item_id: item for item in ask(Benchmarks(("quiz",), (quiz,))).items}
    for item in ask(Benchmarks(("quiz",), (quiz,), limit=5)).items:
        whole = everything[item.item_id]
        assert item.item_digest == whole.item_digest
        # Other neighbours in the batch change the last bits.
        assert item.log_likelihoods == pytest.approx(whole.log_likelihoods, abs=1e-4)


def test_the_prompt_is_part_of_an_items_identity(ask, quiz):
    plain = ask(Benchmarks(("quiz",), (quiz,), limit=2))
    templated = ask(Benchmarks(("quiz",), (quiz,), limit=2, chat_template=True))
    assert [item.item_id for item in plain.items] == [item.item_id for item in templated.items]
    assert {item.item_digest for item in plain.items}.isdisjoint(
        item.item_digest for item in templated.items
    )


def test_progress_counts_answers(ask, quiz, tmp_path):
    ask(Benchmarks(("quiz",), (quiz,), limit=6))
    events = [e for e in EventReader(tmp_path / "e.jsonl").read() if isinstance(e, Progress)]
    assert (events[-1].done, events[-1].total, events[-1].unit) == (12, 12, "answer")


def test_an_unknown_task_is_told_with_its_near_names(quiz):
    with pytest.raises(DataError, match=r"no task `helaswag`; did you mean `hellaswag`"):
        load_benchmarks(Benchmarks(("quiz", "helaswag"), (quiz,)))


@pytest.mark.slow  # the Hub is tried for half a minute
def test_a_benchmark_out_of_reach_asks_for_a_folder_or_a_connection(tmp_path):
    # Through a group of one's own, which may reach into lm-eval's tasks.
    (tmp_path / "far.yaml").write_text("group: far\ntask: [arc_easy]\n")
    expected = r"(?s)`far` cannot be read.*ai2_arc.*holds no copy of it.*--offline-root"
    with pytest.raises(DataError, match=expected):
        load_benchmarks(Benchmarks(("far",), (tmp_path,), offline_root=tmp_path))


def test_an_offline_root_must_be_there(quiz, tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        load_benchmarks(Benchmarks(("quiz",), (quiz,), offline_root=tmp_path / "missing"))


def test_a_benchmark_of_ones_own_that_is_out_of_reach(ask, quiz, tmp_path):
    text = (quiz / "quiz.yaml").read_text().replace("quiz.jsonl", "gone.jsonl")
    (tmp_path / "quiz.yaml").write_text(text)
    with pytest.raises(DataError, match=r"(?s)`quiz` cannot be read.*gone.jsonl"):
        load_benchmarks(Benchmarks(("quiz",), (tmp_path,)))


def test_few_examples_precede_a_question_where_asked_for(ask, quiz):
    none, two = (
        ask(Benchmarks(("quiz",), (quiz,), limit=2, num_fewshot=shots)) for shots in (0, 2)
    )
    assert [measured.settings[0].num_fewshot for measured in (none, two)] == [0, 2]
    assert none.items[0].item_digest != two.items[0].item_digest


def test_no_tasks_need_no_model(ask):
    assert ask(Benchmarks(())) == Measured((), (), ())


def test_our_tasks_divide_the_items_by_what_was_trained_on(ask, tmp_path):
    items = choices()[:40]
    subjects = [item.subject for item in items]
    write_tasks(tmp_path, TASKS, items, trained=set(subjects[:10]), held_out=set(subjects[10:14]))
    measured = ask(Benchmarks(TASKS, (tmp_path,)), batch_size=16)
    by_name = {result.task: result for result in measured.results}
    assert by_name[TRAINED].n == 10
    assert by_name[HELD_OUT].n == 26
    assert by_name[HELD_OUT].metric == "acc_norm"
    assert {"acc", "acc_norm"} <= set(by_name[HELD_OUT].metrics)


def test_our_tasks_say_what_is_missing(tmp_path):
    items = choices()[:4]
    with pytest.raises(DataError, match=r"builtin:python-docs/chats"):
        write_tasks(tmp_path, [TRAINED], items, trained={"elsewhere"}, held_out=set())
    everything = {item.subject for item in items}
    with pytest.raises(DataError, match="no item left"):
        write_tasks(tmp_path, [HELD_OUT], items, trained=everything, held_out=set())


def test_real_benchmarks_run_from_a_folder(ask, real_data, tmp_path):
    (tmp_path / "two.yaml").write_text("group: two\ntask: [mmlu_anatomy, mmlu_virology]\n")
    names = ("hellaswag", "mmlu_anatomy", "two")
    benchmarks = Benchmarks(names, (tmp_path,), limit=4, offline_root=real_data / "hub")
    here = Path.cwd()
    measured = ask(benchmarks, batch_size=16)
    assert Path.cwd() == here
    hellaswag, anatomy, two = measured.results
    assert (hellaswag.metric, hellaswag.n) == ("acc_norm", 4)
    assert (anatomy.metric, anatomy.n) == ("acc", 4)
    assert two.n == 8
    assert two.value == sum(two.groups.values()) / 2
    assert two.groups["mmlu_anatomy"] == anatomy.value
    assert [settings.name for settings in measured.settings] == [
        "hellaswag",
        "mmlu_anatomy",
        "mmlu_virology",
    ]
    for item in measured.items:
        assert len(item.choices) == 4
        assert (item.answer == item.target) == bool(item.value), item
        assert item.question
        if item.task != "hellaswag":
            assert item.choices == ("A", "B", "C", "D")
            assert re.search(r"(?s)^\S.*\nA\. .*\nD\. .*\nAnswer:$", item.question)
