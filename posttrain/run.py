"""One run of a pipeline: what was done so far, who watches, how it ended."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.execute import Observers, Outcome, RunIds, StageObserver, run_step
from posttrain.home import Home
from posttrain.pipeline import Pipeline, Step
from posttrain.plan import forced_steps
from posttrain.store import Artifact
from posttrain.store.manifest import now
from posttrain.tracking import MlflowTracker

Verdict = Literal["pass", "fail", "not enough evidence", "no gate"]

console_observers: list[StageObserver] = []
"""Whoever shows progress in this process, such as a terminal's progress bar."""


@dataclass
class PipelineRun:
    """Runs the steps of a pipeline one by one, and keeps the account."""

    home: Home
    pipeline: Pipeline
    from_step: str | None = None
    prefect_run_id: str | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.started = now()
        self.tracker = MlflowTracker(self.home, self.pipeline)
        self._forced = forced_steps(self.pipeline, self.from_step)

    def __enter__(self) -> PipelineRun:
        """Open the run in MLflow."""
        if self.pipeline.recipe.tracking.enabled:
            tags = {"recipe": self.pipeline.recipe.name, "run": self.id}
            if self.prefect_run_id:
                tags["prefect_run_id"] = self.prefect_run_id
            self.tracker.open(tags)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the run in MLflow."""
        status = "FINISHED"
        if kind is not None:
            status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        self.tracker.close(status, stage_table_markdown(self.pipeline, self.outcomes))

    @property
    def artifacts(self) -> dict[str, Artifact]:
        """Artifacts by step, as far as the run has come."""
        return {name: outcome.artifact for name, outcome in self.outcomes.items()}

    def inputs_of(self, step: Step) -> list[Outcome]:
        """Outcomes of the steps that this one takes something from."""
        return [self.outcomes[name] for name in self.outcomes if name in step.waits_for()]

    def execute(self, step: Step, observers: Sequence[StageObserver] = ()) -> Outcome:
        """Reuse or run one step.

        Raises:
            StageFailed: its program failed.
            StageInterrupted: its program was stopped.
        """
        bound = self.pipeline.bind(step, self.artifacts)
        outcome = run_step(
            bound,
            self.home.store,
            Observers([self.tracker, *console_observers, *observers]),
            force=step.name in self._forced,
            log_level=self.pipeline.recipe.tracking.log_level,
            run_ids=lambda: RunIds(self.tracker.stage_run_id(step.name), self.prefect_run_id),
        )
        self.outcomes[step.name] = outcome
        self.record(self.artifacts)
        return outcome

    def record(self, artifacts: Mapping[str, Artifact]) -> None:
        """Say which artifacts this run uses, so that garbage collection leaves them.

        Done after every step: a run that is killed protects what it used as well.
        """
        record = {
            "recipe": self.pipeline.recipe.name,
            "started": self.started.isoformat(),
            "artifacts": {name: item.fingerprint for name, item in artifacts.items()},
            "mlflow_run_id": self.tracker.run_id,
            "prefect_run_id": self.prefect_run_id,
        }
        self.home.store.record_run(f"{self.started:%Y%m%dT%H%M%S}-{self.id}", record)


def verdict_of(pipeline: Pipeline, artifacts: Mapping[str, Artifact]) -> Verdict:
    """What the gates said: the worst of their verdicts, or `no gate`."""
    ranking: list[Verdict] = ["fail", "not enough evidence", "pass"]
    found: list[Verdict] = [
        artifacts[step.name].manifest.details["verdict"]
        for step in pipeline.steps
        if step.kind == "verdict" and step.name in artifacts
    ]
    return min(found, key=ranking.index) if found else "no gate"


def stage_table_markdown(pipeline: Pipeline, outcomes: Mapping[str, Outcome]) -> str:
    """A table of stages for MLflow's description and Prefect's artifacts."""
    lines = ["| stage | | seconds | result |", "|---|---|---:|---|"]
    for step in pipeline.steps:
        outcome = outcomes.get(step.name)
        if outcome is None:
            lines.append(f"| {step.name} | not reached | | |")
            continue
        headline = outcome.artifact.manifest.headline.replace("|", "\\|")
        lines.append(f"| {step.name} | {outcome.status} | {outcome.seconds:.1f} | {headline} |")
    return "\n".join(lines)


def stage_rows(
    pipeline: Pipeline, artifacts: Mapping[str, Artifact], outcomes: Mapping[str, Outcome]
) -> list[dict[str, Any]]:
    """One line a stage, for the terminal and for `--json`."""
    rows = []
    for step in pipeline.steps:
        artifact, outcome = artifacts.get(step.name), outcomes.get(step.name)
        rows.append(
            {
                "stage": step.name,
                "status": outcome.status if outcome else ("reused" if artifact else "not reached"),
                "seconds": round(outcome.seconds, 1) if outcome else 0.0,
                "tokens": artifact.manifest.metrics.get("tokens") if artifact else None,
                "headline": artifact.manifest.headline if artifact else "",
                "fingerprint": artifact.fingerprint if artifact else None,
                "path": str(artifact.path) if artifact else None,
            }
        )
    return rows
