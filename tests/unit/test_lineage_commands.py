from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from posttrain.commands.lineage import app
from posttrain.errors import DataError, UsageError
from tests.unit.lineage_store import Made, chat, row_name
from tests.unit.test_lineage import ACCOUNT, LEDGER


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    filled = Made(tmp_path / "store")
    rows = {"train": [chat(1, "Jane"), chat(2), chat(3)], "validation": [chat(4), chat(5)]}
    data = filled.dataset(LEDGER, rows)  # type: ignore[arg-type]
    adapter = filled.trained(data, ACCOUNT, mlflow="run-7")
    filled.merged(adapter, data)
    return filled


def lineage(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def said(*arguments: str) -> str:
    result = lineage(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_models_with_a_row(made: Made) -> None:
    output = said("models-with", row_name(1))
    assert "2 models learned from this row." in output
    assert "trained on it, 2 passes" in output
    assert "made from tiny/sft" in output
    assert "run-7" in output


def test_models_with_a_duplicate_are_listed_apart(made: Made) -> None:
    output = said("models-with", "rows.jsonl:6")
    assert "No model learned from this row itself, but 2 did from one that says the same" in output
    assert f"Through its exact duplicate {row_name(1)}:" in output
    assert "dropped by exact_dedup: duplicate" in output


def test_models_with_a_held_out_row(made: Made) -> None:
    output = said("models-with", "rows.jsonl:4")
    assert "No model learned from this row." in output
    assert "Measured with it, not trained on it:" in output
    assert "chose the checkpoint by the loss on it" in output


def test_models_with_rows_by_their_text(made: Made) -> None:
    output = said("models-with", "--grep", "question")
    assert "5 rows in all" in output
    assert "tiny/merge" in output.split("Models that learned from any")[1]
    assert "4 rows that were dropped or could not be read" in " ".join(output.split())
    assert row_name(1) in said("models-with", "--text", "Jane")


def test_the_json_holds_every_row_and_model(made: Made) -> None:
    found = json.loads(said("models-with", "--grep", "question", "--limit", "1", "--json"))
    assert len(found["rows"]) == 5
    assert {model["name"] for model in found["models"]} == {"tiny/sft", "tiny/merge"}
    assert found["searched"] == {"rows": 5, "edited": 1, "dropped": 4}
    assert found["not_answered"] == []


def test_an_unknown_row_is_an_error_that_says_what_was_searched(made: Made) -> None:
    with pytest.raises(DataError, match="no dataset in question has such a row") as caught:
        lineage("models-with", "f" * 16)
    assert caught.value.exit_code == 1
    with pytest.raises(DataError, match="texts of 4 rows that were dropped or could not be read"):
        lineage("models-with", "--grep", "nowhere")


def test_models_with_wants_one_row_or_text(made: Made) -> None:
    for arguments in ([], [row_name(1), "--grep", "x"]):
        with pytest.raises(UsageError, match="--grep or --text"):
            lineage("models-with", *arguments)


def test_rows_of_a_model(made: Made, tmp_path: Path) -> None:
    output = said("rows", "merge", "--out", str(tmp_path / "rows.jsonl"))
    assert "trained on tiny/prepare" in output
    assert "chats: data/rows.jsonl" in output
    assert "2  trained on" in output
    assert "1  not read" in output
    assert "1 by near_dedup: near duplicate" in output
    assert "9 rows written" in output
    counts = json.loads(said("rows", "merge", "--json"))["training_sets"][0]["shares"][0]["rows"]
    assert counts == {"trained": 2, "not read": 1, "validation": 2, "dropped": 3, "bad": 1}


def test_rows_of_a_dataset_are_not_said_to_be_trained_on(made: Made) -> None:
    assert "3  training rows" in said("rows", "prepare")


def test_one_row_of_a_model(made: Made) -> None:
    assert "tiny/merge learned from this row." in said("rows", "merge", "--id", row_name(1))
    output = said("rows", "merge", "--id", "rows.jsonl:8")
    assert "tiny/merge did not learn from this row." in output
    assert "dropped by length: too long" in output
    output = said("rows", "merge", "--id", "rows.jsonl:3")
    assert "tiny/merge did not learn" in output
    assert "Not by tiny/sft" in output


def test_a_row_of_other_datasets_is_no_part_of_a_model(made: Made) -> None:
    from tests.unit.lineage_store import kept, source

    made.dataset([kept(30, file="x.jsonl")], inputs={"rows": source("x.jsonl")}, name="prepare-x")
    output = said("rows", "merge", "--id", row_name(30))
    assert "tiny/merge did not learn from this row." in output
    assert "it is known from tiny/prepare-x" in output


def test_rows_wants_one_question(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one of --id, --grep"):
        lineage("rows", "merge", "--id", "x", "--out", str(tmp_path / "a.jsonl"))
