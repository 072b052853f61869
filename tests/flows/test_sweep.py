"""A sweep on a tiny model: stopped in its second trial, run again, its last trial hopeless."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from posttrain import run as runs
from posttrain.events import Event, Values
from posttrain.execute import StageObserver
from posttrain.home import Home
from posttrain.pipeline import BoundStep
from posttrain.sweeping.record import SweepRecord, read_record
from tests.flows.conftest import Tiny

OVER = ["sft.adapter.rank=2,8", "sft.optimization.learning_rate=0.02,0.0000001"]
OVERRIDES = ["sft.max_steps=6", "sft.validation.every_steps=2", "sft.adapter.dropout=0"]


class Stopped(BaseException):
    """Ctrl-C, or a kill, at a moment of our choosing."""


class Counter(StageObserver):
    """Counts programs, and stops the sweep at an event of one of them."""

    def __init__(self, stop_in: int | None = None) -> None:
        self.started_steps: list[str] = []
        self.reached: list[int] = []
        self._stop_in = stop_in

    def started(self, step: BoundStep) -> None:
        self.started_steps.append(step.step.name)

    def event(self, step: BoundStep, event: Event) -> None:
        if isinstance(event, Values) and "eval_loss" in event.values:
            self.reached.append(event.step)
            if self.started_steps.count("sft") == self._stop_in and event.step > 0:
                raise Stopped


@dataclass(frozen=True)
class Swept:
    """Two attempts at one sweep."""

    home: Home
    folder: Path
    first: Counter
    second: Counter
    after_first: SweepRecord
    record: SweepRecord


@pytest.fixture(scope="module")
def swept(tiny: Tiny, prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:  # fmt: skip
    home = Home(tmp_path_factory.mktemp("sweep-home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_HOME", str(home.root))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        from flows.sweep import sweep

        first, second = Counter(stop_in=2), Counter()
        patch.setattr(runs, "console_observers", [first])
        with pytest.raises(Stopped):
            sweep(str(tiny.recipe), OVER, OVERRIDES)
        [folder] = (home.root / "sweeps").iterdir()
        after_first = read_record(folder)
        patch.setattr(runs, "console_observers", [second])
        state = sweep(str(tiny.recipe), OVER, OVERRIDES, return_state=True)
        assert state.is_completed(), state.message
        record = read_record(folder)
        assert after_first is not None
        assert record is not None
        yield Swept(home, folder, first, second, after_first, record)


def test_stages_before_the_swept_one_run_once(swept: Swept) -> None:
    programs = swept.first.started_steps + swept.second.started_steps
    assert programs.count("prepare") == programs.count("preflight") == 1
    assert swept.record.shared == ("preflight", "contamination", "prepare")


def test_trials_go_no_further_than_the_number_that_decides(swept: Swept) -> None:
    programs = set(swept.first.started_steps + swept.second.started_steps)
    assert not programs & {"merge", "evaluate", "evaluate-base", "gate"}
    assert swept.record.objective == "sft.held_out_loss"


def test_a_stopped_sweep_goes_on_without_doing_anything_twice(swept: Swept) -> None:
    assert [trial.number for trial in swept.after_first.trials] == [0]
    assert swept.first.started_steps.count("sft") == 2
    # The first trial is found; the second goes on; the third and fourth begin.
    assert swept.second.started_steps == ["sft", "sft", "sft"]
    assert swept.second.reached[0] > 2


def test_a_resumed_trial_keeps_the_losses_from_before_it_was_stopped(swept: Swept) -> None:
    resumed = swept.record.trials[1]
    assert [loss.step for loss in resumed.losses][:2] == [0, 2]
"""  """
