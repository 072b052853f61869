"""`posttrain data prepare` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.data.prepared import PreparedDataset


def prepare(
    folder: Path, *arguments: str, home: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "posttrain", "data", "prepare", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**_environment(), "POSTTRAIN_HOME": str(home or folder / "home")},
    )


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Forty chats, one of them twice, one with an address, one that is no answer."""
    rows = [
        {"prompt": f"What is {n} plus {n}?", "completion": f"It is {n + n}."} for n in range(37)
    ]
    rows += [rows[0], {"prompt": "Who?", "completion": "Ask ann@example.org about that one."}]
    rows += [{"prompt": "Why?", "completion": "..."}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_go_in_and_a_dataset_with_a_report_comes_out(chats: Path) -> None:
    folder = chats.parent
    done = prepare(
        folder, "chats.jsonl", "--out", "clean", "--quality", "--pii", "replace", "--test", "0.2"
    )
    assert done.returncode == 0, done.stderr
    assert "40 rows -> " in done.stdout
    assert "1 duplicate" in done.stdout
    assert "1 empty answer" in done.stdout
    assert "clean/report.html" in done.stdout
    dataset = PreparedDataset.open(folder / "clean")
    assert sum(dataset.sizes.values()) == 38
    assert dataset.sizes["test"] > 0
    assert (folder / "clean" / "report.html").stat().st_size > 1_000
    assert not list(folder.glob(".clean*"))


def test_a_dataset_is_replaced_only_when_asked(chats: Path) -> None:
    folder = chats.parent
    assert prepare(folder, "chats.jsonl", "--out", "clean").returncode == 0
    again = prepare(folder, "chats.jsonl", "--out", "clean")
    assert (again.returncode, "add --overwrite" in again.stderr) == (2, True)
    assert prepare(folder, "chats.jsonl", "--out", "clean", "--overwrite").returncode == 0
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    other = prepare(folder, "chats.jsonl", "--out", "mine", "--overwrite")
    assert (other.returncode, "is no prepared dataset" in other.stderr) == (2, True)
    assert (folder / "mine" / "notes.txt").read_text() == "mine"


def test_json_is_one_object_on_standard_output(chats: Path) -> None:
    done = prepare(chats.parent, "chats.jsonl", "--out", "clean", "--json")
    summary = json.loads(done.stdout)
    assert (summary["rows_in"], summary["dropped"]) == (40, {"exact_dedup": {"duplicate": 1}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "no such file"),
        (["chats.jsonl", "--near-dedup", "7"], "is 7.0: input should be less than or equal to 1"),
        (["chats.jsonl", "--pii", "hide"], "write one of: 'replace' or 'drop'"),
        (["chats.jsonl", "--language", "english"], "write `en`"),
        (["chats.jsonl", "--set", "near_dedup.band=16"], "did you mean `bands`?"),
        (["chats.jsonl", "--validation", "0.9", "--test", "0.5"], "leave nothing to train on"),
    ],
)
def test_a_mistake_says_what_to_write(chats: Path, arguments: list[str], message: str) -> None:
    done = prepare(chats.parent, *arguments, "--out", "clean")
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (chats.parent / "clean").exists()


def test_benchmarks_are_indexed_once_for_all_datasets(
    chats: Path, real_data: Path, tmp_path: Path
) -> None:
    item = (real_data / "hub/cais/mmlu/anatomy/test.jsonl").read_text().splitlines()
    question = max((json.loads(line)["question"] for line in item), key=len)
    with chats.open("a") as file:
        file.write(json.dumps({"prompt": question.upper(), "completion": "I know."}) + "\n")
    options = ["--decontaminate", "mmlu_anatomy", "--offline-root", str(real_data / "hub")]
    first = prepare(tmp_path, "chats.jsonl", *options, "--out", "one")
    assert "1 in mmlu_anatomy" in first.stdout, first.stderr
    assert "contamination: ran" in first.stderr
    second = prepare(tmp_path, "chats.jsonl", *options, "--out", "two")
    assert "contamination: reused" in second.stderr
