"""Running one step: look in the store, else work under a lock, then publish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.events import Event
from posttrain.hardware import allocator_settings, describe
from posttrain.launch import LocalLauncher, Program
from posttrain.pipeline import BoundStep
from posttrain.recipe import TrainingConfig, result_config
from posttrain.recipe.training import Launch
from posttrain.stages.program import StageResult
from posttrain.store import Artifact, Manifest, Store
from posttrain.store.files import write_json
from posttrain.store.manifest import now, package_versions
from posttrain.store.store import content_digest


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    artifact: Artifact
    status: Literal["ran", "reused"]
    seconds: float
    """Wall-clock time spent now; next to nothing for a reused step."""


class StageObserver:
    """Somebody who wants to know: a tracker, a progress bar, a flow's log."""

    def started(self, step: BoundStep) -> None:
        """The program is about to start."""

    def event(self, step: BoundStep, event: Event) -> None:
        """The program said something."""

    def waiting(self, step: BoundStep) -> None:
        """Another run works on the same step."""

    def finished(self, step: BoundStep, outcome: Outcome) -> None:
        """The artifact is there."""

    def failed(self, step: BoundStep, error: BaseException) -> None:
        """The program failed or was stopped."""


class Observers(StageObserver):
    """Several observers as one."""

    def __init__(self, observers: Iterable[StageObserver]) -> None:
        self._observers = tuple(observers)

    def started(self, step: BoundStep) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.started(step)

    def event(self, step: BoundStep, event: Event) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.event(step, event)

    def waiting(self, step: BoundStep) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.waiting(step)

    def finished(self, step: BoundStep, outcome: Outcome) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.finished(step, outcome)

    def failed(self, step: BoundStep, error: BaseException) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.failed(step, error)


@dataclass(frozen=True)
class RunIds:
    """Where a stage was recorded."""

    mlflow: str | None = None
    prefect: str | None = None


def run_step(
    step: BoundStep,
    store: Store,
    observer: StageObserver,
    *,
    force: bool = False,
    log_level: str = "INFO",
    run_ids: Callable[[], RunIds] = RunIds,
) -> Outcome:
    """Reuse the step's artifact, or make it.

    Args:
        step: a step whose inputs are known.
        store: where artifacts are found and published.
        observer: told of all that happens.
        force: make it even if it is there.
        log_level: of the stage's program.
        run_ids: asked when the program has ended, for the manifest.

    Raises:
        StageFailed: the program failed; its message is the program's own.
        StageInterrupted: the program was stopped; the next run goes on from its checkpoint.
    """
    begin = time.monotonic()
    kind, fingerprint = step.step.kind, step.fingerprint
    artifact = None if force else store.find(kind, fingerprint)
    if artifact is None:
        with store.lock(fingerprint, lambda: observer.waiting(step)) as lock:
            # Whoever held the lock may have made it in the meantime.
            artifact = None if force else store.find(kind, fingerprint)
            if artifact is None:
                return _work(step, store, observer, lock, log_level, run_ids, force)
    outcome = Outcome(artifact, "reused", time.monotonic() - begin)
    observer.finished(step, outcome)
    return outcome


def _work(
    step: BoundStep,
    store: Store,
    observer: StageObserver,
    lock: int,
    log_level: str,
    run_ids: Callable[[], RunIds],
    force: bool,
) -> Outcome:
    begin = time.monotonic()
    work = store.work_folder(step.fingerprint)
    write_json(work / "stage.json", step.job(log_level, store.cache).model_dump(mode="json"))
    observer.started(step)
    launch = _launch_of(step)
    try:
        program = Program(
            module=f"posttrain.stages.{step.step.stage}",
            stage_dir=work,
            num_processes=launch.num_processes,
            nodes=launch.nodes,
            rendezvous=launch.rendezvous,
            torchrun=launch.distributed,
            env={k: v for k, v in allocator_settings().items() if k not in os.environ},
            keep_fds=(lock,),
            name=step.step.name,
        )
        result = LocalLauncher().run(program, lambda event: observer.event(step, event))
        seconds = time.monotonic() - begin
        artifact = _publish(step, store, work, result, seconds, run_ids(), force)
    except BaseException as error:
        observer.failed(step, error)
        raise
    outcome = Outcome(artifact, "ran", time.monotonic() - begin)
    observer.finished(step, outcome)
    return outcome


def _publish(
    step: BoundStep,
    store: Store,
    work: Path,
    result: StageResult,
    seconds: float,
    run_ids: RunIds,
    force: bool,
) -> Artifact:
    files = store.record_files(work / "output", step.step.config.accounts)
    manifest = Manifest(
        kind=step.step.kind,
        stage=step.step.stage,
        name=step.step.name,
        recipe=step.recipe,
        fingerprint=step.fingerprint,
        content_digest=content_digest(files),
        code_version=step.step.config.code_version,
        config=result_config(step.step.config),
        inputs=step.inputs,
        files=files,
        metrics=result.metrics,
        headline=result.headline,
        details=result.details,
        created=now(),
        seconds=round(seconds, 3),
        packages=package_versions(),
        hardware=describe(),
        mlflow_run_id=run_ids.mlflow,
        prefect_run_id=run_ids.prefect,
    )
    return store.publish(work, manifest, replace=force)


def _launch_of(step: BoundStep) -> Launch:
    config = step.step.config
    return config.launch if isinstance(config, TrainingConfig) else Launch()
