"""What a sweep has found so far: `sweep.json`, from which a killed sweep goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from posttrain.errors import StoreError
from posttrain.evaluate.results import Outcome
from posttrain.store.files import write_json
from posttrain.sweeping.space import label

RECORD = "sweep.json"

TrialStatus = Literal["complete", "pruned", "failed"]

_FROM_BEST: tuple[Outcome, ...] = ("pass", "not enough evidence", "fail")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Loss(_Frozen):
    """One look at the held-out loss while training."""

    step: int
    """Optimizer step; 0 is before training."""
    loss: float
    """Nats a trained token."""
    percent: int | None = None
    """Share of the run's planned steps, in percent: what trials of other lengths compare by."""


class TrialRun(_Frozen):
    """A trial with one seed."""

    seed: int | None
    """Seed of the training stages; None: as the recipe has it."""
    overrides: tuple[str, ...]
    """What `--set` would take, the seed included."""
    status: TrialStatus
    reused: bool = False
    """Whether everything was in the store."""
    value: float | None = None
    """The objective; None unless complete."""
    fingerprint: str | None = None
    """Of the artifact that the objective is a metric of, or would have been."""
    artifact: str | None = None
    """Its folder."""
    verdict: Outcome | None = None
    """Of the gate that has to be passed; None without one."""
    losses: tuple[Loss, ...] = ()
    """Held-out losses while training, by step."""
    seconds: float = 0.0
    """Wall-clock time of the trial's own stages, whenever they ran."""
    mlflow_run_id: str | None = None
    message: str = ""
    """Why it was stopped or failed."""


class Trial(_Frozen):
    """One combination of values, with all its seeds."""

    number: int
    values: dict[str, JsonValue]
    status: TrialStatus
    value: float | None = None
    """Mean objective over the seeds; None unless complete."""
    difference: float | None = None
    """To the best trial: by how much this one is worse."""
    standard_error: float | None = None
    """Of `difference`; None where it cannot be known. 0 for the best itself."""
    runs: tuple[TrialRun, ...]

    @property
    def label(self) -> str:
        """`rank=8`."""
        return label(self.values)

    @property
    def verdict(self) -> Outcome | None:
        """Of the gate: the worst over the seeds; None without one."""
        found = [run.verdict for run in self.runs if run.verdict is not None]
        return max(found, key=_FROM_BEST.index) if found else None

    @property
    def may_be_chosen(self) -> bool:
        """Whether it came to its end and passes the gate, if there is one."""
        return self.value is not None and self.verdict in (None, "pass")

    @property
    def losses(self) -> tuple[Loss, ...]:
        """Of the first seed."""
        return self.runs[0].losses if self.runs else ()

    @property
    def seconds(self) -> float:
        """Over all seeds."""
        return sum(run.seconds for run in self.runs)

    @property
    def reused(self) -> bool:
        """Whether nothing had to be trained."""
        return all(run.reused for run in self.runs)

    @property
    def message(self) -> str:
        """Why it was stopped or failed."""
        return next((run.message for run in self.runs if run.message), "")


class Choice(_Frozen):
    """The trial to take, and why."""

    number: int
    values: dict[str, JsonValue]
    best: int
    """Number of the trial with the best objective."""
    rule: Literal["one standard error", "best"]
    reason: str
    command: str
    """Runs the recipe with the chosen values."""


class SweepRecord(_Frozen):
    """A sweep, finished or not."""

    schema_version: int = 1
    recipe: str
    file: str
    overrides: tuple[str, ...] = ()
    """The user's own `--set`."""
    over: tuple[str, ...]
    """What was swept, as it was written."""
    keys: tuple[str, ...]
    objective: str
    """`STAGE.METRIC`."""
    maximize: bool = False
    gate: str | None = None
    """The gate that a trial has to pass to be chosen."""
    seeds: int = 1
    planned: int
    """Trials in all."""
    shared: tuple[str, ...] = ()
    """Stages that were run once for all trials."""
    trials: tuple[Trial, ...] = ()
    choice: Choice | None = None
    notes: tuple[str, ...] = ()
    """What a reader of the table should know."""
    mlflow_run_id: str | None = None

    @property
    def finished(self) -> bool:
        """Whether every planned trial has ended."""
        return len(self.trials) >= self.planned

    def write(self, folder: Path) -> None:
        """Leave `sweep.json`, atomically."""
        write_json(folder / RECORD, self.model_dump(mode="json"))


def read_record(folder: Path) -> SweepRecord | None:
    """The record of an earlier attempt, or None.

    Raises:
        StoreError: there is one and it cannot be read.
    """
    path = folder / RECORD
    try:
        return SweepRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise StoreError(f"{path}: cannot be read; remove it to begin anew: {error}") from error
