from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from posttrain.errors import DataError
from posttrain.evaluate.contamination import EvaluationItem, evaluation_items
from posttrain.evaluate.harness import Benchmarks
from posttrain.evaluate.python_docs_task import TASKS

PASSAGE = "The lighthouse at Skerry Point was lit for the first time in the winter of 1844."
ROWS = [
    {
        "passage": PASSAGE,
        "question": f"How many lamps did keeper number {number} light each evening?",
        "options": [f"{number} lamps of oil", "none at all", "a hundred candles"],
        "answer": 0,
    }
    for number in range(6)
]


def write_task(folder: Path, rows: list[dict[str, object]] = ROWS, **settings: object) -> Path:
    """An lm-eval task `lamps` as a user would write it."""
    data = folder / "lamps.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "lamps",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}}\nQuestion: {{question}}\nAnswer:",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **settings,
    }
    (folder / "lamps.yaml").write_text(yaml.safe_dump(task))
    return folder


def items_of(folder: Path, **settings: object) -> list[EvaluationItem]:
    return evaluation_items(Benchmarks(("lamps",), (write_task(folder, **settings),)))


def test_an_item_gives_prompt_question_answer_and_both(tmp_path):
    item = items_of(tmp_path)[3]
    question = ROWS[3]["question"]

    assert (item.benchmark, item.leaf, item.item) == ("lamps", "lamps", 3)
    assert item.question == question
    prompt = f"{PASSAGE}\nQuestion: {question}\nAnswer:"
    assert item.texts[0] == prompt
    assert {PASSAGE, question, "3 lamps of oil"} < set(item.texts)
    assert {f"{question}\n3 lamps of oil", f"{prompt}\n3 lamps of oil"} < set(item.texts)


def test_wrong_choices_are_not_looked_for_alone(tmp_path):
    assert all("a hundred candles" not in item.texts for item in items_of(tmp_path))


def test_all_items_are_given_whatever_the_limit(tmp_path):
    benchmarks = Benchmarks(("lamps",), (write_task(tmp_path),), limit=2)
    assert [item.item for item in evaluation_items(benchmarks)] == list(range(6))


def test_letters_as_choices_stand_for_the_texts_of_the_raw_item(tmp_path):
    item = items_of(tmp_path, doc_to_choice=["A", "B", "C"])[2]
    assert "2 lamps of oil" in item.texts
    assert not any(text.endswith("\nA") for text in item.texts)


def test_several_right_choices_are_all_looked_for(tmp_path):
    texts = items_of(tmp_path, doc_to_target="{{[0, 2]}}")[1].texts
    assert {"1 lamps of oil", "a hundred candles"} < set(texts)


def test_a_generation_task_gives_its_target(tmp_path):
    item = items_of(
        tmp_path,
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{options[0]}}, as the log says",
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )[4]
    assert "4 lamps of oil, as the log says" in item.texts


def test_choices_before_one_ending_give_the_right_beginning(tmp_path):
    # Winogrande's form: the choices are the sentence's beginnings, the target is its end.
    item = items_of(
        tmp_path,
        doc_to_text="{{answer + 1}}",
        doc_to_choice="{{[passage, question, 'unlit']}}",
        doc_to_target="until the fog had gone",
    )[0]
    assert item.texts[0] == ROWS[0]["question"]
    assert f"{ROWS[0]['question']}\nuntil the fog had gone" in item.texts


def test_the_tasks_about_the_training_rows_are_left_out(tmp_path):
    folder = write_task(tmp_path)
    assert len(evaluation_items(Benchmarks(("lamps", *TASKS), (folder,)))) == len(ROWS)
    assert evaluation_items(Benchmarks(TASKS)) == []


def test_a_task_behind_two_names_counts_for_the_first(tmp_path):
    group = {"group": "sea", "task": ["lamps"]}
    (tmp_path / "sea.yaml").write_text(yaml.safe_dump(group))
    items = evaluation_items(Benchmarks(("sea", "lamps"), (write_task(tmp_path),)))
    assert {(item.benchmark, item.leaf) for item in items} == {("sea", "lamps")}
    assert len(items) == len(ROWS)


def test_an_unknown_task_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no task `lumps`; did you mean `lamps`"):
        evaluation_items(Benchmarks(("lumps",), (write_task(tmp_path),)))


def test_mmlu_and_hellaswag_give_every_item_by_the_name_asked_for(real_data):
    benchmarks = Benchmarks(("mmlu_anatomy", "hellaswag"), offline_root=real_data / "hub")
    items = evaluation_items(benchmarks)

    hub = real_data / "hub"
    anatomy = (hub / "cais/mmlu/anatomy/test.jsonl").read_text().splitlines()
    swag = next((hub / "Rowan/hellaswag").rglob("*validation*")).read_text().splitlines()
    assert Counter(item.leaf for item in items) == {
        "mmlu_anatomy": len(anatomy),
        "hellaswag": len(swag),
    }
    raw = json.loads(anatomy[0])
    assert items[0].question == raw["question"]
    assert raw["choices"][raw["answer"]] in items[0].texts
