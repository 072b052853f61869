from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.prepared import Counts, PreparedDataset
from posttrain.data.sources import source_digest
from posttrain.errors import DataError
from posttrain.recipe import DatasetSpec, PrepareConfig
from posttrain.stages.prepare import main
from posttrain.stages.program import StageContext, StageResult, read_result


def stage_dir(folder: Path, spec: DatasetSpec, **config: Any) -> Path:
    folder.mkdir(parents=True)
    job = {
        "stage": "prepare",
        "name": "prepare",
        "config": {"stage": "prepare", "dataset": "rows", **config},
        "inputs": {
            "rows": {
                "kind": "source",
                "path": str(spec.source),
                "digest": source_digest(spec),
                "spec": spec.model_dump(mode="json"),
            }
        },
    }
    (folder / "stage.json").write_text(json.dumps(job))
    return folder


def prepare(folder: Path, spec: DatasetSpec, **config: Any) -> tuple[StageResult, PreparedDataset]:
    context = StageContext(stage_dir(folder, spec, **config), PrepareConfig)
    return main(context), PreparedDataset.open(context.output)


def write_rows(path: Path, *records: Mapping[str, object]) -> DatasetSpec:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DatasetSpec(source=str(path), on_bad_row="skip")


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    texts = [{"text": f"text number {number}"} for number in range(40)]
    spec = write_rows(
        tmp_path / "a.jsonl",
        *texts,
        {"text": "Text  number 3"},
        {"text": "text  number 3"},
        {"text": ""},
        {"text": "x" * 101},
        {"text": "x"},
    )
    bounds = {"min_characters": 2, "max_characters": 100}
    result, dataset = prepare(tmp_path / "stage", spec, length=bounds)
    counts = Counts.model_validate(result.details)
    assert (counts.rows_in, counts.bad, counts.train + counts.validation) == (45, 1, 41)
    assert counts.dropped == {
        "length": {"too long": 1, "too short": 1},
        "exact_dedup": {"duplicate": 1},
    }
    assert (len(dataset.train()), len(dataset.validation())) == (counts.train, counts.validation)
    assert result.headline == (
        f"45 rows -> {counts.train} train + {counts.validation} validation "
        "(4 dropped: 1 too long, 1 too short, 1 duplicate, 1 bad)"
    )
    assert result.metrics["rows_in"] == 45
    assert result.metrics["dropped_too_long"] == 1

    ledger = dataset.ledger()
    assert [line.row for line in ledger] == list(range(1, 46))
    duplicate, bad, long = ledger[41], ledger[42], ledger[43]
    assert (duplicate.verdict, duplicate.operation) == ("drop", "exact_dedup")
    assert duplicate.kept_id == ledger[3].id
    assert (bad.verdict, bad.detail, bad.split) == ("bad", "`text` is empty", None)
    assert long.detail == "101 characters; at most 100"
    kept = {line.id: line.split for line in ledger if line.verdict == "keep"}
    assert kept == {
        **{row.id: "train" for row in dataset.train()},
        **{row.id: "validation" for row in dataset.validation()},
    }
    sides = {"train": dataset.train(), "validation": dataset.validation()}
    for line in ledger:
        if line.verdict == "keep":
            assert line.split is not None
            assert line.output is not None
            assert sides[line.split][line.output].id == line.id


def test_case_and_dedup_are_settings(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "a.jsonl", *({"text": text} for text in ("a", "A", "b", "b")))

    def rows_dropped(name: str, **config: Any) -> int:
        result, _ = prepare(tmp_path / name, spec, **config)
        return Counts.model_validate(result.details).rows_dropped

    assert rows_dropped("1") == 1
    assert rows_dropped("2", exact_dedup={"ignore_case": True}) == 2
    assert rows_dropped("3", exact_dedup=None) == 0


def test_empty_side_is_an_error(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "a.jsonl", {"text": "short"}, {"text": "much longer text"})
    with pytest.raises(DataError, match="cannot keep rows away from training: 1 rows with 1"):
        prepare(tmp_path / "stage", spec, length={"max_characters": 10})
    with pytest.raises(DataError, match="no row can be used"):
        prepare(tmp_path / "none", write_rows(tmp_path / "b.jsonl", {"text": ""}))


def test_files_that_changed_since_planning_are_refused(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    context = StageContext(stage_dir(tmp_path / "stage", spec), PrepareConfig)
    write_rows(tmp_path / "a.jsonl", {"text": "a"}, {"text": "c"})
    with pytest.raises(DataError, match="changed since the run was planned"):
        main(context)


def run_program(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "posttrain.stages.prepare", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "dpo_en_demo.json", "kto_en_demo.json"])
def test_real_data_gives_the_same_bytes_twice(real_data: Path, tmp_path: Path, name: str) -> None:
    spec = DatasetSpec(source=str(real_data / name))
    outputs = []
    for attempt in ("1", "2"):
        folder = stage_dir(tmp_path / attempt, spec)
        done = run_program(folder)
        assert done.returncode == 0, done.stderr
        assert read_result(folder) is not None
        outputs.append({path.name: path.read_bytes() for path in (folder / "output").iterdir()})
    data = {"train.parquet", "validation.parquet", "test.parquet", "ledger.parquet", "dataset.json"}
    assert set(outputs[0]) == data | {"report.html", "report.json"}
    assert all(outputs[0][name] == outputs[1][name] for name in data)


def test_program_leaves_its_last_words(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "a.jsonl", {"text": "only one"})
    folder = stage_dir(tmp_path / "stage", spec)
    assert run_program(folder).returncode == 1
    last = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "error"
    assert "cannot keep rows away from training: 1 row" in last["message"]
    assert read_result(folder) is None
