"""The mechanism behind every stage's task: run it, show it, say how it ended."""

from __future__ import annotations

import time
from typing import cast

from prefect import State
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.states import Completed
from prefect.utilities.annotations import quote

from posttrain.data.report import report_markdown
from posttrain.data.report_data import ReportData
from posttrain.events import Event, Failure, Phase, Progress, Warn, describe_progress
from posttrain.execute import Outcome, StageObserver
from posttrain.pipeline import BoundStep, Step
from posttrain.run import PipelineRun
from posttrain.train.history import loss_markdown

_SECONDS_BETWEEN_LOGS = 5.0
"""Prefect's database is no place for a line a step; the full log is a file."""


def untracked(run: PipelineRun) -> PipelineRun:
    """The run, hidden from Prefect's search of arguments for results of other tasks.

    A run holds all outcomes so far; Prefect would draw an edge from every earlier stage.
    """
    return cast(PipelineRun, quote(run))


def run_stage(step: Step, inputs: list[Outcome], run: PipelineRun) -> State[Outcome]:
    """Run or reuse one step; the returned state's name says which.

    `inputs` are the outcomes that the step takes, for Prefect to draw the graph by; the run knows
    them as well.

    Prefect's own result cache is not used: it pickles results and never looks at what a stage
    left on disk. The store does both jobs, so a hit is a state of ours.
    """
    del inputs
    outcome = run.execute(step, [FlowObserver()])
    headline = outcome.artifact.manifest.headline
    _keep_report(outcome, run)
    name = "Cached" if outcome.status == "reused" else "Completed"
    return Completed(name=name, message=headline, data=outcome)


class FlowObserver(StageObserver):
    """Turns a stage's events into Prefect's logs and a progress artifact."""

    def __init__(self) -> None:
        self._log = get_run_logger()
        self._progress: object = None
        self._next = 0.0

    def started(self, step: BoundStep) -> None:
        """Say where the full log is written."""
        self._log.info("started; fingerprint %s", step.fingerprint[:12])

    def event(self, step: BoundStep, event: Event) -> None:
        """Log phases and warnings as they come, progress every few seconds."""
        match event:
            case Phase():
                self._log.info("%s", event.message)
            case Warn():
                self._log.warning("%s", event.message)
            case Failure():
                self._log.error("%s", event.message)
            case Progress() if time.monotonic() >= self._next or event.done == event.total:
                self._next = time.monotonic() + _SECONDS_BETWEEN_LOGS
                self._log.info("%s", describe_progress(event))
                self._show_progress(step, event)
            case _:
                pass

    def waiting(self, step: BoundStep) -> None:
        """Say that another run does the same work."""
        self._log.info("another run works on the same step; waiting for its result")

    def finished(self, step: BoundStep, outcome: Outcome) -> None:
        """Log the headline."""
        headline = outcome.artifact.manifest.headline
        self._log.info("%s in %.1f s: %s", outcome.status, outcome.seconds, headline)

    def _show_progress(self, step: BoundStep, event: Progress) -> None:
        percent = 100.0 * event.done / max(event.total, 1)
        text = describe_progress(event)
        if self._progress is None:
            key = f"progress-{step.step.name}".replace("_", "-")
            self._progress = create_progress_artifact(percent, key=key, description=text)
        else:
            update_progress_artifact(self._progress, percent, description=text)  # type: ignore[arg-type]


def _keep_report(outcome: Outcome, run: PipelineRun) -> None:
    """Show a verdict's, a dataset's or a training's report among the run's artifacts."""
    folder, name = outcome.artifact.path, outcome.artifact.manifest.name
    key = name.replace("_", "-")
    # A browser follows no link from a server's page to a file, so its path is shown.
    page = f"\n\nThe whole report: `{folder / 'report.html'}`"
    try:
        if (folder / "training.json").exists():
            create_markdown_artifact(loss_markdown(folder), key=f"loss-{key}")
        if (folder / "verdict.md").exists():
            verdict = (folder / "verdict.md").read_text(encoding="utf-8")
            create_markdown_artifact(verdict + page, key="verdict")
        elif (folder / "report.html").exists():
            data = ReportData.model_validate_json((folder / "report.json").read_bytes())
            create_markdown_artifact(report_markdown(data) + page, key=f"report-{key}")
        address = run.tracker.artifacts_page(name)
        if (folder / "report.html").exists() and address is not None:
            link = f"report-{key}-page"
            create_link_artifact(address, "report.html in MLflow", key=link)
    except MissingContextError:
        return
