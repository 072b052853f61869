from __future__ import annotations

import json
from pathlib import Path

import yaml

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


def test_the_question_is_found_among_empty_and_padded_fields(tmp_path):
    rows = [{**row, "question": f"{row['question']} ", "hint": "", "topic": "oil"} for row in ROWS]
    settings = {"doc_to_text": "{{question.strip()}}\n{{options | join('\n')}}"}
    folder = write_task(tmp_path, rows, **settings)
    items = evaluation_items(Benchmarks(("lamps",), (folder,)))
    assert [item.question for item in items] == [row["question"] for row in ROWS]


def test_a_question_of_one_word_is_found_at_the_prompts_beginning(tmp_path):
    rows = [{**row, "question": "Lighthouses", "topic": "oil"} for row in ROWS]
    folder = write_task(tmp_path, rows, doc_to_text="{{question}}\n{{options | join('\n')}}")
    item = evaluation_items(Benchmarks(("lamps",), (folder,)))[0]
    assert item.question == "Lighthouses"
    assert "Lighthouses\n0 lamps of oil" in item.texts


def test_a_text_without_a_prompt_is_its_own_question(tmp_path):
    # The form of tasks that measure perplexity.
    item = items_of(tmp_path, doc_to_text="", doc_to_choice=None, doc_to_target="{{passage}}")[0]
    assert item.question == PASSAGE


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


def test_a_choice_named_by_its_text_is_the_answer(tmp_path):
    by_name = items_of(tmp_path, doc_to_target="{{options[2]}}")[1]
    assert "a hundred candles" in by_name.texts
    assert "1 lamps of oil" not in by_name.texts

    none_of_them = items_of(tmp_path, doc_to_target="as many as there were ships")[1]
    assert "as many as there were ships" in none_of_them.texts
    assert "1 lamps of oil" not in none_of_them.texts


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
