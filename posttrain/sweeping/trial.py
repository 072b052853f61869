"""One trial while it runs: its losses, its end, and its place in MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from posttrain.errors import StageInterrupted
from posttrain.events import Event, EventReader, Progress, Values
from posttrain.execute import Outcome, StageObserver
from posttrain.home import Home
from posttrain.pipeline import BoundStep, Pipeline, Step
from posttrain.run import PipelineRun, stage_table_markdown
from posttrain.store import Artifact, Store
from posttrain.store.store import STAGE_FOLDER
from posttrain.sweeping.record import Loss
from posttrain.sweeping.space import Point, show_value

_EVENTS = "events.jsonl"
_EVAL_LOSS = "eval_loss"

GiveUp = Callable[[Sequence[Loss]], str | None]
"""Held-out losses so far in, the reason to stop out."""


class TrialPruned(StageInterrupted):
    """A trial was stopped because it was hopeless. Its checkpoint stays."""


class LossCurve:
    """Held-out losses by step, gathered from a stage's events."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._losses: dict[int, float] = {}
        self._total: int | None = None
        for event in events:
            self.add(event)

    @classmethod
    def read(cls, folder: Path) -> LossCurve:
        """Of all attempts that wrote to a folder's `events.jsonl`; empty where there is none."""
        return cls(EventReader(folder / _EVENTS).read())

    def add(self, event: Event) -> bool:
        """Take an event in; whether it was a held-out loss."""
        match event:
            case Progress(unit="step"):
                self._total = event.total
            case Values() if _EVAL_LOSS in event.values:
                self._losses[event.step] = event.values[_EVAL_LOSS]
                return True
            case _:
                pass
        return False

    @property
    def losses(self) -> tuple[Loss, ...]:
        """In order of steps."""
        return tuple(
            Loss(step=step, loss=loss, percent=self._percent(step))
            for step, loss in sorted(self._losses.items())
        )

    def _percent(self, step: int) -> int | None:
        return round(100 * step / self._total) if self._total else None


class ObjectiveWatch(StageObserver):
    """Follows the stage whose metric decides, and stops it where it is hopeless.

    It stops it by raising: the launcher then ends the program in good order, which leaves a
    checkpoint.
    """

    def __init__(self, step: str, store: Store, give_up: GiveUp | None) -> None:
        self._step = step
        self._store = store
        self._give_up = give_up
        self.curve = LossCurve()
        self.fingerprint: str | None = None

    def started(self, step: BoundStep) -> None:
        """Begin with what an interrupted attempt has seen."""
        if step.step.name == self._step:
            self.fingerprint = step.fingerprint
            self.curve = LossCurve.read(self._store.work_folder(step.fingerprint))

    def event(self, step: BoundStep, event: Event) -> None:
        """Take a held-out loss in.

        Raises:
            TrialPruned: it is hopeless.
        """
        if step.step.name != self._step or not self.curve.add(event) or self._give_up is None:
            return
        reason = self._give_up(self.curve.losses)
        if reason is not None:
            raise TrialPruned(f"stopped at step {self.curve.losses[-1].step}: {reason}")

    def finished(self, step: BoundStep, outcome: Outcome) -> None:
        """Read the whole curve, of a reused artifact too."""
        if step.step.name == self._step:
            self.fingerprint = outcome.artifact.fingerprint
            self.curve = LossCurve.read(outcome.artifact.path / STAGE_FOLDER)


class TrialPipeline(PipelineRun):
    """The stages of a trial, as an MLflow run nested in the sweep's."""

    def __init__(
        self,
        home: Home,
        pipeline: Pipeline,
        *,
        name: str,
        shared: Mapping[str, Outcome],
        watch: ObjectiveWatch,
        on_record: Callable[[Mapping[str, Artifact]], None],
    ) -> None:
        """Prepare a run.

        Args:
            home: Where the store and the tracking database are.
            pipeline: The recipe with the trial's values, as far as the trial goes.
            name: What the run is called in MLflow.
            shared: Outcomes of the stages that were run for all trials.
            watch: Follows the stage whose metric decides.
            on_record: Told which artifacts are to be kept, after every stage.
        """
        super().__init__(home, pipeline, outcomes=dict(shared))
        self._name = name
        self.watch = watch
        self._on_record = on_record

    def open_in(self, parent: str | None, number: int, values: Point, seed: int | None) -> None:
        """Start the nested run, with the trial's values as its parameters."""
        if not self.pipeline.recipe.tracking.enabled:
            return
        tags = {"recipe": self.pipeline.recipe.name, "trial": str(number)}
        self.tracker.open(tags, name=self._name, parent=parent)
        params = {tracked_key(key): show_value(value) for key, value in values.items()}
        if seed is not None:
            params["seed"] = str(seed)
        self.tracker.annotate(params=params)

    def __enter__(self) -> TrialPipeline:
        """Nothing more: `open_in` has started the run."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the nested run; a hopeless trial's is KILLED, as is one stopped from outside."""
        ended = "complete" if kind is None else "pruned" if kind is TrialPruned else "failed"
        self.tracker.annotate(tags={"trial.status": ended})
        table = stage_table_markdown(self.pipeline, self.outcomes)
        self.tracker.close(mlflow_status(kind), table)

    def execute(self, step: Step, observers: Sequence[StageObserver] = ()) -> Outcome:
        """Reuse or run one step. The watch comes last: all others have seen what it stops at.

        Raises:
            StageFailed: its program failed.
            StageInterrupted: its program was stopped.
            TrialPruned: the trial is hopeless.
        """
        return super().execute(step, [*observers, self.watch])

    def record(self, artifacts: Mapping[str, Artifact]) -> None:
        """Leave it to the sweep, which is one run and not many."""
        self._on_record(artifacts)


def mlflow_status(kind: type[BaseException] | None) -> str:
    """How a run that ended with this exception, or none, is shown."""
    if kind is None:
        return "FINISHED"
    stopped = issubclass(kind, StageInterrupted) or not issubclass(kind, Exception)
    return "KILLED" if stopped else "FAILED"


def tracked_key(key: str) -> str:
    """A recipe's key as MLflow takes it: `stages[1].sft.seed` has brackets, which it does not."""
    return key.replace("[", ".").replace("]", "")
