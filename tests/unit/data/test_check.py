from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.data.check import check_dataset
from posttrain.recipe import DatasetSpec


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_good_dataset(here: Path) -> None:
    (here / "a.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    assert check_dataset("a", DatasetSpec(source="a.jsonl"), "chats") == ("chats", [])
    assert check_dataset("a", DatasetSpec(source="a.jsonl"), None) == ("chats", [])


def test_missing_file() -> None:
    family, (problem,) = check_dataset("a", DatasetSpec(source="a.jsonl"), "chats")
    assert family is None
    assert problem.where == "datasets.a.source"
    assert "no such file" in problem.message


def test_wrong_family_names_both_and_the_formats(here: Path) -> None:
    (here / "a.md").write_text("x")
    family, (problem,) = check_dataset("a", DatasetSpec(source="a.md"), "preferences")
    assert family == "documents"
    assert problem.where == "datasets.a.format"
    assert problem.message == "its rows are documents, but the stage that uses it needs preferences"
    assert problem.fix == "use a dataset in one of these formats: preference"


def test_bad_rows_are_one_problem_unless_skipped(here: Path) -> None:
    lines = ['{"text": "x"}', '{"text": ""}', "{", '{"text": 3}', '{"text": null}']
    (here / "a.jsonl").write_text("\n".join(lines))
    _, (problem,) = check_dataset("a", DatasetSpec(source="a.jsonl"), "documents")
    assert problem.message.startswith("a.jsonl:2: `text` is empty; a.jsonl:3: not valid JSON")
    assert problem.message.endswith("; and 1 more")
    assert "on_bad_row: skip" in (problem.fix or "")
    skipping = DatasetSpec(source="a.jsonl", on_bad_row="skip")
    assert check_dataset("a", skipping, "documents") == ("documents", [])


def test_nothing_but_bad_rows_is_a_problem_even_if_skipped(here: Path) -> None:
    (here / "a.jsonl").write_text("{\n{\n")
    spec = DatasetSpec(source="a.jsonl", on_bad_row="skip")
    _, (problem,) = check_dataset("a", spec, None)
    assert "none of the first 2 rows can be used" in problem.message


def test_empty_file(here: Path) -> None:
    (here / "a.jsonl").write_text("\n")
    _, (problem,) = check_dataset("a", DatasetSpec(source="a.jsonl"), None)
    assert problem.message == "a.jsonl:1: the file is empty"
    (here / "a.csv").write_text("text\n")
    _, (problem,) = check_dataset("a", DatasetSpec(source="a.csv"), None)
    assert problem.message == "a.csv: holds no rows"


def test_columns_that_fit_no_format_are_one_problem(here: Path) -> None:
    (here / "a.jsonl").write_text('{"question": "x"}\n' * 5)
    _, (problem,) = check_dataset("a", DatasetSpec(source="a.jsonl"), None)
    assert problem.message.count("no format fits the columns (question)") == 1


def test_only_the_first_rows_are_read(here: Path) -> None:
    (here / "a.jsonl").write_text('{"text": "x"}\n' * 20 + "{")
    assert check_dataset("a", DatasetSpec(source="a.jsonl"), None) == ("documents", [])
    assert check_dataset("a", DatasetSpec(source="a.jsonl"), None, rows=21)[1]


@pytest.mark.parametrize("part", ["documents", "chats", "preferences"])
def test_family_of_a_built_in_source_is_what_it_gives(part: str) -> None:
    spec = DatasetSpec(source=f"builtin:python-docs/{part}")
    # Naming a format has the rows read; leaving it out takes the short cut.
    named = {"documents": "text", "chats": "messages", "preferences": "preference"}[part]
    read = spec.model_copy(update={"format": named})
    assert check_dataset("a", spec, None) == check_dataset("a", read, None) == (part, [])


def test_hub_dataset_is_judged_by_its_stated_format() -> None:
    spec = DatasetSpec(source="hub:owner/name", format="alpaca")
    assert check_dataset("a", spec, "chats") == ("chats", [])
    assert check_dataset("a", spec, "documents")[1]
    assert check_dataset("a", DatasetSpec(source="hub:owner/name"), "chats") == (None, [])
