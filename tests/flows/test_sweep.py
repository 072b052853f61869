"""A sweep on a tiny model: stopped in its second trial, run again, its last trial hopeless."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas.objects import TaskRun
from prefect.client.schemas.sorting import TaskRunSort

from posttrain import run as runs
from posttrain.events import Event, Values
from posttrain.execute import StageObserver
from posttrain.home import Home
from posttrain.pipeline import BoundStep
from posttrain.store import Store
from posttrain.sweeping.record import SweepRecord, read_record
from tests.flows.conftest import Tiny

RATE = "sft.optimization.learning_rate"
OVER = [f"{RATE}=0.02,0.01,1e-7"]
OVERRIDES = ["sft.seed=3"]


class Stopped(BaseException):
    """Ctrl-C, or a kill, at a moment of our choosing."""


class Counter(StageObserver):
    """Counts programs, and stops the sweep at a held-out loss of one of them."""

    def __init__(self, stop_in: int | None = None) -> None:
        self.programs: list[str] = []
        self.looks: list[list[int]] = []
        """Steps at which a training looked at its held-out loss, for each program of `sft`."""
        self._stop_in = stop_in

    def started(self, step: BoundStep) -> None:
        self.programs.append(step.step.name)
        if step.step.name == "sft":
            self.looks.append([])

    def event(self, step: BoundStep, event: Event) -> None:
        if isinstance(event, Values) and "eval_loss" in event.values:
            self.looks[-1].append(event.step)
            if len(self.looks) == self._stop_in and event.step > 0:
                raise Stopped


@dataclass(frozen=True)
class Swept:
    """Two attempts at one sweep."""

    recipe: Path
    home: Home
    folder: Path
    first: Counter
    second: Counter
    after_first: SweepRecord
    record: SweepRecord
    flow_run_id: str


@pytest.fixture(scope="module")
def recipe(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe without the evaluation; a merge follows the training."""
    whole = yaml.safe_load(tiny.recipe.read_text())
    prepare, sft, merge, *_ = whole["stages"]
    sft["sft"] |= {"max_steps": 6, "validation": {"every_steps": 2}}
    path = tmp_path_factory.mktemp("sweep") / "recipe.yaml"
    path.write_text(yaml.safe_dump({**whole, "stages": [prepare, sft, merge]}))
    return path


@pytest.fixture(scope="module")
def swept(
    recipe: Path, prefect_server: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Swept]:
    home = Home(tmp_path_factory.mktemp("sweep-home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_HOME", str(home.root))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        from flows.sweep import sweep

        first, second = Counter(stop_in=2), Counter()
        patch.setattr(runs, "console_observers", [first])
        with pytest.raises(Stopped):
            sweep(str(recipe), OVER, OVERRIDES)
        [folder] = (home.root / "sweeps").iterdir()
        after_first = read_record(folder)
        patch.setattr(runs, "console_observers", [second])
        state = sweep(str(recipe), OVER, OVERRIDES, return_state=True)
        assert state.is_completed(), state.message
        record = read_record(folder)
        assert after_first is not None
        assert record is not None
        flow_run = str(state.state_details.flow_run_id)
        yield Swept(recipe, home, folder, first, second, after_first, record, flow_run)


def test_stages_before_the_swept_one_run_once(swept: Swept) -> None:
    assert swept.record.shared == ("preflight", "prepare")
    programs = swept.first.programs + swept.second.programs
    assert sorted(programs) == ["preflight", "prepare", *["sft"] * 4]


def test_a_stopped_sweep_goes_on_without_doing_anything_twice(swept: Swept) -> None:
    assert [trial.number for trial in swept.after_first.trials] == [0]
    # The first trial is found, the second goes on from its checkpoint, the third begins.
    _, stopped = swept.first.looks
    resumed, hopeless = swept.second.looks
    assert (stopped[0], hopeless[0]) == (0, 0)
    # How far it came is a matter of the machine's speed: perhaps to its last step.
    assert not set(resumed) & set(stopped)
    assert swept.record.trials[0].reused


def test_a_resumed_trial_keeps_the_losses_from_before_it_was_stopped(swept: Swept) -> None:
    assert [loss.step for loss in swept.record.trials[1].losses] == [0, 2, 4, 6]


def test_a_hopeless_trial_is_stopped_and_never_chosen(swept: Swept) -> None:
    pruned = swept.record.trials[2]
    assert (pruned.status, pruned.value) == ("pruned", None)
    assert pruned.message.startswith("stopped at step 2: held-out loss ")
    assert swept.record.choice is not None
    assert swept.record.choice.number != 2


def test_a_stopped_trial_leaves_its_checkpoint(swept: Swept) -> None:
    fingerprint = swept.record.trials[2].runs[0].fingerprint
    assert fingerprint is not None
    work = Store(swept.home.root / "store").root / "work" / fingerprint
    assert any((work / "checkpoints").iterdir())


def test_the_objective_is_the_one_of_the_artifacts(swept: Swept) -> None:
    trained = {
        artifact.manifest.config["optimization"]["learning_rate"]: artifact
        for artifact in swept.home.store.artifacts()
        if artifact.manifest.stage == "sft"
    }
    assert sorted(trained) == [0.01, 0.02]
    for trial in swept.record.trials[:2]:
        artifact = trained[trial.values[RATE]]
        assert trial.value == artifact.manifest.metrics["held_out_loss"]
        assert artifact.manifest.config["seed"] == 3


def test_the_difference_to_the_best_has_a_standard_error(swept: Swept) -> None:
    choice = swept.record.choice
    assert choice is not None
    [other] = [t for t in swept.record.trials[:2] if t.number != choice.best]
    assert other.difference is not None
    assert other.difference > 0
    assert other.standard_error is not None
    assert 0 < other.standard_error < 1
    assert (choice.rule, choice.number) == ("best", choice.best)
    assert choice.command.endswith(
        f"--set sft.seed=3 --set {RATE}={swept.record.trials[choice.best].values[RATE]}"
    )


def test_trials_are_nested_runs_and_their_stages_nested_below_them(swept: Swept) -> None:
    import mlflow

    client = mlflow.MlflowClient(swept.home.tracking_uri)
    experiment = client.get_experiment_by_name("tiny")
    everything = client.search_runs([experiment.experiment_id])
    parent = client.get_run(str(swept.record.mlflow_run_id))

    def below(run_id: str) -> dict[str, object]:
        return {
            run.info.run_name: run
            for run in everything
            if run.data.tags.get("mlflow.parentRunId") == run_id
        }

    trials = below(parent.info.run_id)
    assert set(trials) == {f"learning_rate={rate}" for rate in ("0.02", "0.01", "1e-07")}
    good, bad = trials["learning_rate=0.01"], trials["learning_rate=1e-07"]
    assert good.data.params == {RATE: "0.01"}
    assert good.data.metrics["sft.held_out_loss"] == swept.record.trials[1].value
    assert (good.info.status, bad.info.status) == ("FINISHED", "KILLED")
    assert bad.data.tags["posttrain.trial.status"] == "pruned"
    assert {name: run.info.status for name, run in below(good.info.run_id).items()} == {
        "sft": "FINISHED"
    }
    assert {name: run.info.status for name, run in below(bad.info.run_id).items()} == {
        "sft": "KILLED"
    }
    chosen = swept.record.trials[swept.record.choice.number]  # type: ignore[union-attr]
    assert parent.data.tags[f"posttrain.chosen.{RATE}"] == str(chosen.values[RATE])
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files >= {"sweep.json", "sweep.html"}
    interrupted = [run for run in everything if run.info.status == "KILLED"]
    assert len(interrupted) == 5  # the first attempt, its trial and stage; the hopeless trial's two


def test_prefect_shows_stages_once_a_task_for_each_trial_and_the_table(swept: Swept) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        tasks: list[TaskRun] = client.read_task_runs(sort=TaskRunSort.END_TIME_DESC)
        artifacts = client.read_artifacts()
    states = {t.name: t.state_name for t in tasks if str(t.flow_run_id) == swept.flow_run_id}
    assert states == {
        "preflight": "Cached",
        "prepare": "Cached",
        "learning_rate=0.02": "Cached",
        "learning_rate=0.01": "Completed",
        "learning_rate=1e-07": "Pruned",
    }
    shown = [str(artifact.data) for artifact in artifacts if artifact.key == "sweep"]
    assert any(str(swept.folder / "sweep.html") in text and "pruned" in text for text in shown)


def test_garbage_collection_leaves_the_trials_and_the_recipes_own_runs(swept: Swept) -> None:
    from posttrain.store.gc import find_garbage

    garbage = find_garbage(swept.home.store, keep_runs=1, keep_days=0)
    assert [item for item in garbage if item.path.parent.name != "work"] == []


@pytest.mark.slow
def test_the_command_line_finds_the_finished_sweep_and_says_what_to_run(swept: Swept) -> None:
    command = ["-m", "posttrain", "sweep", str(swept.recipe), "--over", *OVER]
    command += ["--set", *OVERRIDES, "--json"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = SweepRecord.model_validate(json.loads(done.stdout))
    assert [trial.value for trial in found.trials] == [t.value for t in swept.record.trials]
    assert found.choice == swept.record.choice
    assert "stopped at step 2" in done.stderr


def test_exit_code_2_for_a_key_that_changes_nothing(swept: Swept) -> None:
    command = ["-m", "posttrain", "sweep", str(swept.recipe), "--over"]
    done = subprocess.run(
        [sys.executable, *command, "sft.launch.log_every_steps=1,2", "--metric", "sft.tokens"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "changes nothing that sft.tokens depends on" in done.stderr
    assert "Traceback" not in done.stderr
