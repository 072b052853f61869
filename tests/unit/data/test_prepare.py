from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.prepared import PreparedDataset
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
    counts = dataset.counts
    assert (counts.rows_in, counts.bad, counts.train + counts.held_out) == (45, 1, 41)
    assert counts.dropped == {
        "length": {"too long": 1, "too short": 1},
        "exact_dedup": {"duplicate": 1},
    }
    assert (len(dataset.train()), len(dataset.held_out())) == (counts.train, counts.held_out)
    assert result.headline == (
        f"45 rows -> {counts.train} train + {counts.held_out} held out "
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
    assert long.detail == "101 characters, max_characters is 100"
    kept = {line.id: line.split for line in ledger if line.verdict == "keep"}
    assert kept == {
        **{row.id: "train" for row in dataset.train()},
        **{row.id: "held_out" for row in dataset.held_out()},
    }


def test_case_and_dedup_are_settings(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "a.jsonl", *({"text": text} for text in ("a", "A", "b", "b")))
    assert prepare(tmp_path / "1", spec)[1].counts.rows_dropped == 1
    assert (
        prepare(tmp_path / "2", spec, exact_dedup={"ignore_case": True})[1].counts.rows_dropped == 2
    )
    assert prepare(tmp_path / "3", spec, exact_dedup=None)[1].counts.rows_dropped == 0


def test_empty_side_is_an_error(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "a.jsonl", {"text": "short"}, {"text": "much longer text"})
    with pytest.raises(
        DataError, match=r"no (training|held-out) row is left: 2 rows -> .* 1 too long"
    ):
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
    assert outputs[0] == outputs[1]
    assert set(outputs[0]) == {
        "train.parquet",
        "held_out.parquet",
        "ledger.parquet",
        "dataset.json",
    }


def test_program_leaves_its_last_words(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "a.jsonl", {"text": "only one"})
    folder = stage_dir(tmp_path / "stage", spec)
    assert run_program(folder).returncode == 1
    last = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "error"
    assert "cannot hold rows out for validation: 1 row" in last["message"]
    assert read_result(folder) is None
