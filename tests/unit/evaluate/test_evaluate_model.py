"""`posttrain evaluate MODEL`: a model of the store or of anywhere, measured through the store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from posttrain.errors import UsageError
from posttrain.evaluation import evaluate_model
from posttrain.events import Event, Phase
from posttrain.execute import Outcome, StageObserver
from posttrain.pipeline import BoundStep
from posttrain.store import Artifact, Store
from tests.unit.lineage_store import Made, source


class Listener(StageObserver):
    def __init__(self) -> None:
        self.phases: list[str] = []
        self.statuses: list[str] = []

    def event(self, step: BoundStep, event: Event) -> None:
        if isinstance(event, Phase):
            self.phases.append(event.message)

    def finished(self, step: BoundStep, outcome: Outcome) -> None:
        self.statuses.append(outcome.status)


@pytest.fixture
def tasks(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, items in (("sums", 8), ("more", 6)):
        rows = [
            {"question": f"{name} {n} =", "choices": [str(n), "no"], "answer": 0}
            for n in range(items)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder


@pytest.fixture
def made(tmp_path, tiny_model) -> Made:
    made = Made(tmp_path / "store")

    def write(folder: Path) -> None:
        shutil.copytree(tiny_model, folder, dirs_exist_ok=True)

    made.put("merge", "model", {"model": source("base")}, write, recipe="quickstart")
    made.put("sft", "adapter", {"model": source("base")}, write, recipe="quickstart")
    return made


def evaluate(
    model: str, store: Store, tasks: Path, *names: str, **settings: object
) -> tuple[Listener, Artifact]:
    listener = Listener()
    _, artifact = evaluate_model(
        model,
        names,
        offline_root=None,
        limit=None,
        store=store,
        observer=listener,
        task_folders=(str(tasks),),
        **settings,  # type: ignore[arg-type]
    )
    return listener, artifact


def test_a_model_of_the_store_is_asked_what_it_has_not_been_asked(made, tasks):
    store = made.store
    first, artifact = evaluate("quickstart/merge", store, tasks, "sums")
    assert first.statuses == ["ran"]
    more, _ = evaluate("artifact:quickstart/merge", store, tasks, "sums", "more")
    assert "16 of 28 answers were given before" in more.phases
    again, same = evaluate("merge", store, tasks, "sums")
    assert (again.statuses, same.path) == (["reused"], artifact.path)
    assert artifact.manifest.config["backend"] == "shared_prefixes"


def test_what_is_no_model_is_told(made, tasks):
    with pytest.raises(UsageError, match="is an adapter; merge it first"):
        evaluate("quickstart/sft", made.store, tasks, "sums")
    with pytest.raises(UsageError, match=r"(?s)neither a folder.*no such artifact"):
        evaluate("nothing", made.store, tasks, "sums")
    with pytest.raises(UsageError, match="no such artifact"):
        evaluate("artifact:nothing", made.store, tasks, "sums")
    with pytest.raises(UsageError, match="at least one task"):
        evaluate("quickstart/merge", made.store, tasks)
