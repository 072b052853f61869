"""`posttrain compare` as a user calls it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from posttrain.commands import compare as commands
from posttrain.errors import PosttrainError, UsageError
from posttrain.evaluate.items import Item
from posttrain.model_reference import resolve_model
from posttrain.recipe.base import ArtifactKind
from posttrain.store import Artifact, InputRecord, Manifest, Store
from posttrain.store.fingerprint import stage_fingerprint
from posttrain.store.manifest import now
from posttrain.store.store import content_digest
from tests.conftest import make_tiny_model
from tests.unit.evaluate.report_made import evaluation, quiz, rows

HELLASWAG = """---
configs:
- config_name: default
  data_files:
  - {split: validation, path: validation.jsonl}
  - {split: train, path: train.jsonl}
---
"""


class Home:
    """A store with two models, an adapter, and evaluations of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root / "store")
        self._made = 0
        self.base = self.model("convert")
        self.tuned = self.model("merge")

    def model(self, name: str, kind: ArtifactKind = "model") -> Artifact:
        folder = self._folder()
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(name)
        weights = InputRecord(kind="source", digest=name, source=name)
        base = {"model": _input(self.base)} if kind == "adapter" else {}
        return self._put(name, kind, folder, {"weights": weights, **base})

    def evaluate(
        self,
        model: Artifact | InputRecord,
        scores: list[float] | None = None,
        *,
        nats: float = 0.0,
        seed: int = 0,
        asked: str = "bench",
        task: str = "quiz",
    ) -> Artifact:
        items: list[Item] = quiz(scores, task) if scores else []
        held_out = rows(nats) if nats else []
        folder = evaluation(self._folder(), items, held_out, seed=seed)
        benchmarks = InputRecord(kind="source", digest=asked)
        asked_of = model if isinstance(model, InputRecord) else _input(model)
        inputs = {"model": asked_of, "benchmarks": benchmarks}
        return self._put("evaluate", "evaluation", folder, inputs)

    def _folder(self) -> Path:
        self._made += 1
        return self.root / "made" / str(self._made)

    def _put(
        self, name: str, kind: ArtifactKind, folder: Path, inputs: dict[str, InputRecord]
    ) -> Artifact:
        """Publish a folder as if a stage had left it, a minute after the one before."""
        config = {"number": self._made}
        digests = {key: record.digest for key, record in inputs.items()}
        work = self.store.work_folder(stage_fingerprint(name, 1, config, digests))
        shutil.copytree(folder, work / "output")
        files = self.store.record_files(work / "output")
        manifest = Manifest(
            kind=kind, stage=name, name=name, recipe="tiny", fingerprint=work.name,
            content_digest=content_digest(files), code_version=1, config=config, inputs=inputs,
            files=files, created=now() + timedelta(minutes=self._made), seconds=1.0, packages={},
            hardware={},
        )  # fmt: skip
        return self.store.publish(work, manifest)


def _input(artifact: Artifact) -> InputRecord:
    return InputRecord(kind=artifact.kind, digest=artifact.digest, fingerprint=artifact.fingerprint)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "home"))
    return Home(tmp_path / "home")


def call(*arguments: str) -> Result:
    app = typer.Typer()
    app.command("compare")(commands.compare)
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, PosttrainError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


RIGHT = [1.0] * 60 + [0.0] * 40


def test_evaluations_that_are_there_are_compared(home: Home) -> None:
    home.evaluate(home.base, RIGHT, nats=3.0)
    home.evaluate(home.tuned, [1.0] * 90 + [0.0] * 10, nats=2.5)
    shown = call("convert", "merge").stdout
    assert "tiny/" in shown
    assert [line.split()[:5] for line in shown.splitlines() if line.startswith("quiz")] == [
        ["quiz", "100", "0.600", "0.900", "+0.300"]
    ]
    assert "perplexity" in shown
    found = json.loads(call("convert", "merge", "--json").stdout)
    assert found["models"] == ["tiny/convert", "tiny/merge"]
    (task,) = found["tasks"]
    assert task["values"] == [0.6, 0.9]
    assert task["difference"] == pytest.approx(0.3)
    assert task["low"] < task["difference"] < task["high"]
    (rows_of,) = found["perplexity"]
    assert rows_of["difference"] == pytest.approx(0.5)
    assert rows_of["unit"] == "nats a token"
    page = Path(found["report"]).read_text()
    assert "<h1>tiny/merge beside tiny/convert</h1>" in page
    assert str(home.root) not in page


def test_the_page_goes_where_it_is_told_to(home: Home, tmp_path: Path) -> None:
    home.evaluate(home.base, RIGHT)
    home.evaluate(home.tuned, RIGHT[::-1])
    found = json.loads(call("convert", "merge", "--out", str(tmp_path / "o"), "--json").stdout)
    assert found["report"] == str(tmp_path / "o/report.html")
    again = json.loads(call("convert", "merge", "--json").stdout)
    assert Path(again["report"]).read_bytes() == (tmp_path / "o/report.html").read_bytes()


def test_the_newest_pair_that_asked_the_same_is_taken(home: Home) -> None:
    home.evaluate(home.base, RIGHT, task="old")
    home.evaluate(home.tuned, RIGHT, task="old")
    wanted = home.evaluate(home.base, RIGHT)
    other = home.evaluate(home.tuned, RIGHT[::-1])
    home.evaluate(home.tuned, RIGHT, seed=3)
    home.evaluate(home.tuned, RIGHT, asked="other questions")
    found = json.loads(call("convert", "merge", "--json").stdout)
    assert found["evaluations"] == [str(wanted.path), str(other.path)]


def test_an_adapter_is_compared_by_what_it_was_asked(home: Home) -> None:
    adapter = home.model("sft", "adapter")
    home.evaluate(home.base, RIGHT)
    home.evaluate(adapter, RIGHT[::-1])
    found = json.loads(call("convert", "sft", "--json").stdout)
    assert found["models"] == ["tiny/convert", "tiny/sft"]


def test_a_folder_outside_the_store_is_called_by_its_name(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    digest = resolve_model(str(folder), home.store.digests).digest
    home.evaluate(home.base, RIGHT)
    home.evaluate(InputRecord(kind="model", digest=digest, source=str(folder)), RIGHT[::-1])
    found = json.loads(call("convert", str(folder), "--json").stdout)
    assert found["models"] == ["tiny/convert", "mine"]


def test_without_a_pair_the_error_says_what_to_write(home: Home) -> None:
    home.evaluate(home.base, RIGHT)
    with pytest.raises(UsageError) as caught:
        call("convert", "merge")
    assert "(convert: quiz; merge: none)" in str(caught.value)
    assert "posttrain compare convert merge --tasks hellaswag" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("convert", "convert"), "are one model"),
        (("convert", "evaluate"), r"tiny/evaluate \(evaluation\) is not a model"),
        (("convert", "nowhere"), "nowhere"),
        (("convert", "merge", "--max-drop", "2"), "write a share between 0 and 1"),
    ],
)
def test_names_that_mean_no_two_models_are_refused(
    home: Home, arguments: tuple[str, ...], said: str
) -> None:
    home.evaluate(home.base, RIGHT)
    with pytest.raises(UsageError, match=said):
        call(*arguments)


@pytest.mark.slow
def test_two_models_are_asked_alike_and_only_once(
    home: Home, tiny_model: Path, tmp_path: Path
) -> None:
    hub = tmp_path / "hub/Rowan/hellaswag"
    hub.mkdir(parents=True)
    (hub / "README.md").write_text(HELLASWAG)
    item = {"activity_label": "Sailing", "ctx_a": "A boat", "ctx_b": "it", "label": "1"}
    items = [
        {**item, "ind": n, "ctx": f"A boat {n}", "endings": ["sinks", "sails", "flies", f"{n}"]}
        for n in range(6)
    ]
    lines = "".join(json.dumps(one) + "\n" for one in items)
    for name in ("validation", "train"):
        (hub / f"{name}.jsonl").write_text(lines)
    models = (str(tiny_model), str(make_tiny_model(tmp_path / "other", seed=7)))
    asked = ("--tasks", "hellaswag", "--offline-root", str(tmp_path / "hub"), "--limit", "4")
    found = json.loads(call(*models, *asked, "--json").stdout)
    assert found["models"] == [tiny_model.name, "other"]
    assert [(one["task"], one["items"]) for one in found["tasks"]] == [("hellaswag", 4)]
    # From the store: the same without tasks.
    assert json.loads(call(*models, "--json").stdout) == found
