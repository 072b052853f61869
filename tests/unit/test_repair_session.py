"""Repairing a recipe from its run in the store: what is proposed, written, and run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.errors import UsageError
from posttrain.execute import StageObserver, run_step
from posttrain.home import Home
from posttrain.opening import open_pipeline
from posttrain.plan import make_plan
from posttrain.repair.session import Diagnosis, diagnose, write
from posttrain.store import Artifact, Store

# One recipe is run to its end, and so is what repairs it.
pytestmark = pytest.mark.slow

RECIPE = """\
# Answers in one voice.
name: voice
model: {model}

datasets:
  chats: {{source: {folder}/chats.jsonl}}
  texts: {{source: {folder}/texts.jsonl}}

stages:
  - sft:                       # more than it takes
      dataset: chats
      full: {{}}
      max_steps: 12
      optimization: {{learning_rate: 2e-2}}
      batching: {{batch_size: 4, max_length: 64}}
      dtype: float32
  # Judged by what it was not trained on.
  - evaluate: {{dataset: texts, samples: {{count: 0}}}}
  - gate: {{}}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("repair-store"))


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that forgets, run to its end."""
    folder = tmp_path_factory.mktemp("repair")
    chats = [{"prompt": f"Voice {n}?", "completion": "Yes yes yes yes."} for n in range(160)]
    texts = [
        {"text": f"Number {n} of {n * n} other things, in words: {n + 3}."} for n in range(160)
    ]
    for name, rows in (("chats", chats), ("texts", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    file = folder / "voice.yaml"
    file.write_text(RECIPE.format(model=tiny_model, folder=folder))
    assert ran(file, store) == {
        *("preflight", "prepare-chats", "prepare-texts", "evaluate-base", "sft", "evaluate", "gate")
    }
    return file


@pytest.fixture
def own_store(recipe: Path, store: Store, tmp_path: Path) -> Store:
    """A store with that run in it, to run more in."""
    shutil.copytree(store.root, tmp_path / "own-store")
    return Store(tmp_path / "own-store")


@pytest.fixture
def copied(recipe: Path, tmp_path: Path) -> Path:
    """The same recipe in a folder without repairs."""
    file = tmp_path / recipe.name
    file.write_text(recipe.read_text())
    return file


def ran(file: Path, store: Store) -> set[str]:
    """Run a recipe; the names of the stages that were not in the store."""
    pipeline, done, names = open_pipeline(file, (), store), dict[str, Artifact](), set()
    for step in pipeline.steps:
        outcome = run_step(pipeline.bind(step, done), store, StageObserver())
        done[step.name] = outcome.artifact
        names |= {step.name} if outcome.status == "ran" else set()
    return names


def ids(found: Diagnosis) -> list[str]:
    return [option.remedy.id for option in found.options]


def test_what_was_forgotten_is_taken_back_by_mixing_weights_and_nothing_trains_again(
    copied: Path, own_store: Store
) -> None:
    found = diagnose(copied, (), own_store)
    assert (found.gate, found.verdict.verdict) == ("gate", "fail")
    option = found.options[0]
    assert option.remedy.id.startswith("interpolate-")
    assert option.cost is not None
    assert option.cost.runs == ("merge", "evaluate", "gate")
    file = write(found, 0)
    assert file.name == "voice.repair-1.yaml"
    plan = make_plan(open_pipeline(file, (), own_store), own_store)
    assert {one.step.name for one in plan.steps if one.action == "run"} == {
        *("merge", "evaluate", "gate")
    }
    assert ran(file, own_store) == {"merge", "evaluate", "gate"}
    # What was tried is not proposed again: from the recipe it was made from, nor from itself.
    again = diagnose(copied, (), own_store)
    assert again.attempts[0].file == "voice.repair-1.yaml"
    assert again.attempts[0].verdict in ("pass", "fail", "not enough evidence")
    assert option.remedy.id not in ids(again)
    repaired = diagnose(file, (), own_store)
    if repaired.verdict.verdict != "pass":
        assert option.remedy.id not in ids(repaired)
        assert write(repaired, 0).name == "voice.repair-2.yaml"


def test_the_written_recipe_is_the_users_own_with_a_reason_at_each_change(
    copied: Path, store: Store
) -> None:
    found = diagnose(copied, (), store)
    text = write(found, 0).read_text()
    before = copied.read_text().splitlines()
    kept = [line for line in text.splitlines() if line in before]
    assert kept == before
    added = [line for line in text.splitlines() if line not in before]
    assert added[0] == f"# repair 1 of voice.yaml: {found.options[0].remedy.id}"
    assert "rise" in added[1]
    assert added[2].startswith("  # added: part of the way from base to tuned weights (WiSE-FT)")
    assert added[3].startswith("  - merge: {method: interpolate, weight: 0.")


def test_every_remedy_that_is_offered_makes_a_valid_recipe(copied: Path, store: Store) -> None:
    found = diagnose(copied, (), store)
    assert {one.rpartition("-")[0] or one for one in ids(found)} >= {
        *("interpolate", "learning-rate", "max-steps", "lora")
    }
    for position, option in enumerate(found.options):
        if option.cost is None:
            assert option.obstacle
            continue
        file = write(found, position, copied.with_name(f"other-{position}.yaml"))
        open_pipeline(file, (), store)
        assert {"evaluate", "gate"} <= set(option.cost.runs)
        if option.remedy.id in ("lora", "learning-rate-0.006"):
            assert "sft" in option.cost.runs
            assert option.cost.seconds is not None


def test_general_rows_that_nothing_is_trained_on_are_replayed(copied: Path, store: Store) -> None:
    found = diagnose(copied, (), store)
    [option] = [one for one in found.options if one.remedy.id.startswith("replay")]
    # Documents cannot be mixed among chats: said, not written.
    assert option.cost is None
    assert "`chats` holds chats and `texts` holds documents" in option.obstacle


def test_set_is_written_into_the_recipe(copied: Path, store: Store) -> None:
    with pytest.raises(UsageError, match=r"run it first: posttrain run .* --set sft\.seed=3"):
        diagnose(copied, ["sft.seed=3"], store)
    found = diagnose(copied, ["gate.bootstrap_samples=10000"], store)
    written = yaml.safe_load(write(found, 0).read_text())
    assert written["stages"][-1] == {"gate": {"bootstrap_samples": 10000}}


def test_without_a_verdict_or_a_gate_there_is_nothing_to_repair(
    copied: Path, store: Store, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="run it first"):
        diagnose(copied, (), Store(tmp_path / "empty"))
    copied.write_text(copied.read_text().replace("  - gate: {}\n", ""))
    with pytest.raises(UsageError, match="has no gate"):
        diagnose(copied, (), store)


def test_no_file_is_overwritten_and_no_remedy_made_up(copied: Path, store: Store) -> None:
    found = diagnose(copied, (), store)
    with pytest.raises(UsageError, match="the file exists"):
        write(found, 0, copied)
    with pytest.raises(UsageError, match=rf"--remedy 99: there are {len(found.options)} remedies"):
        write(found, 98)
    by_hand = next(n for n, option in enumerate(found.options) if option.cost is None)
    with pytest.raises(UsageError, match="cannot be written"):
        write(found, by_hand)


# The command


@pytest.fixture
def command(store: Store, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `posttrain repair`, on the store of these tests."""
    import typer

    from posttrain.commands.repair import repair

    monkeypatch.setattr(Home, "store", store)
    app = typer.Typer()
    app.command()(repair)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_lists_writes_and_says_what_to_run(copied: Path, command: Any) -> None:
    listed = command(copied, "--list")
    assert listed.exit_code == 0, listed.output
    assert "1. interpolate: " in listed.output
    assert "cost: merge, evaluate, gate run; " in listed.output
    assert not list(copied.parent.glob("*.repair-*"))
    second = command(copied, "--remedy", 2, "--out", copied.with_name("mine.yaml"))
    if second.exit_code == 0:
        assert "Written: " in second.output
    first = command(copied, "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.output)
    assert found["written"].endswith("voice.repair-1.yaml")
    assert found["remedies"][0]["cost"]["runs"] == ["merge", "evaluate", "gate"]


def test_a_recipe_that_passes_is_left_alone(
    copied: Path, own_store: Store, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied.write_text(copied.read_text().replace("dataset: texts", "dataset: chats"))
    assert ran(copied, own_store) == {"evaluate-base", "evaluate", "gate"}
    monkeypatch.setattr(Home, "store", own_store)
    done = command(copied)
    assert done.exit_code == 0, done.output
    assert "gate: pass" in done.output
    assert "There is nothing to repair." in done.output
    assert not list(copied.parent.glob("*.repair-*"))
