"""Running a sweep: the shared stages once, then trial after trial, each kept as it ends."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import PosttrainError, RecipeError, StageFailed
from posttrain.execute import StageObserver
from posttrain.home import Home
from posttrain.pipeline import Pipeline
from posttrain.run import PipelineRun
from posttrain.store import Artifact
from posttrain.store.files import write_bytes
from posttrain.store.locks import exclusive
from posttrain.sweeping import study
from posttrain.sweeping.choice import Pick, choose, on_other_rows, with_comparisons
from posttrain.sweeping.gating import NothingPasses, measure
from posttrain.sweeping.page import PAGE, headline, page_html, table_markdown
from posttrain.sweeping.plan import SweepPlan
from posttrain.sweeping.record import (
    RECORD,
    Choice,
    SweepRecord,
    Trial,
    TrialRun,
    TrialStatus,
    read_record,
)
from posttrain.sweeping.space import Point, label, override, short_keys, show_value
from posttrain.sweeping.trial import (
    ObjectiveWatch,
    TrialPipeline,
    TrialPruned,
    mlflow_status,
    tracked_key,
)


@dataclass(frozen=True)
class Proposal:
    """A trial that is to be run, or was."""

    number: int
    """From 0."""
    values: Point

    @property
    def label(self) -> str:
        """`rank=8`."""
        return label(self.values)


class SweepWatcher:
    """Somebody who wants to know how a sweep goes."""

    def sweep_opened(self, record: SweepRecord) -> None:
        """The record is there, with the trials of earlier attempts."""

    def trial_started(self, proposal: Proposal) -> None:
        """A trial begins."""

    def trial_finished(self, trial: Trial, record: SweepRecord) -> None:
        """A trial was completed, stopped, or failed; the record has it."""


console_watchers: list[SweepWatcher] = []
"""Whoever shows trials in this process; for stages see `posttrain.run.console_observers`."""


class SweepRun(PipelineRun):
    """One attempt at a sweep, and the run of the stages that its trials share.

    A context: it holds the sweep's folder for itself and goes on from what an earlier attempt left
    there. `sweep.json` and `sweep.html` are written after every trial.
    """

    def __init__(self, home: Home, plan: SweepPlan, prefect_run_id: str | None = None) -> None:
        super().__init__(home, plan.pipeline, prefect_run_id=prefect_run_id)
        self.plan = plan
        self.folder = plan.folder(home.root)
        self.result = new_record(plan)
        self._prune = plan.request.prune and plan.objective.is_held_out_loss
        self.tried: set[int] = set()
        """Numbers of the trials that this attempt has run or found."""
        self._earlier: dict[int, Trial] = {}
        self._kept: dict[str, str] = {}
        self._what = ""
        """What the objective counts, once a trial has said so."""
        self._held = ExitStack()

    def __enter__(self) -> SweepRun:
        """Take the folder, read what is there, open the run in MLflow."""
        self._held.enter_context(exclusive(self.folder / ".lock"))
        earlier = read_record(self.folder)
        if earlier is not None:
            self._earlier = {trial.number: trial for trial in earlier.trials}
        if self.pipeline.recipe.tracking.enabled:
            keys = self.plan.space.keys
            tags = {"recipe": self.pipeline.recipe.name, "run": self.id, "sweep": ", ".join(keys)}
            if self.prefect_run_id:
                tags["prefect_run_id"] = self.prefect_run_id
            words = " and ".join(short_keys(keys).values())
            self.tracker.open(tags, name=f"{self.pipeline.recipe.name}: sweep over {words}")
        # A longer sweep over the same ranges goes on where the shorter one ended.
        trials = [
            trial for number, trial in sorted(self._earlier.items()) if number < self.plan.trials
        ]
        update = {"trials": tuple(trials), "mlflow_run_id": self.tracker.run_id}
        self.result = self.result.model_copy(update=update)
        for watcher in console_watchers:
            watcher.sweep_opened(self.result)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the run in MLflow with the table, and let the folder go."""
        try:
            self._log_result()
            self.tracker.close(mlflow_status(kind), table_markdown(self.result))
        finally:
            self._held.close()

    @property
    def page(self) -> Path:
        """The page with table and plot."""
        return self.folder / PAGE

    def proposals(self) -> Iterator[Proposal]:
        """The trials in order; each is to be run before the next one is asked for."""
        for number in range(self.plan.trials):
            if number in self._earlier:
                yield Proposal(number, self._earlier[number].values)
            else:
                maximize = self.plan.objective.maximize
                values = study.propose(self.plan.space, self.result.trials, maximize=maximize)
                yield Proposal(number, values)

    def run_trial(
        self, proposal: Proposal, observer: Callable[[], StageObserver] = StageObserver
    ) -> Trial:
        """Run a trial with all its seeds, or find it in the store; keep what came out.

        A trial that is hopeless or fails ends itself and not the sweep.

        Args:
            proposal: One of `proposals`.
            observer: Called for each stage, for somebody who wants to know.

        Raises:
            StageInterrupted: the trial was stopped from outside.
            UsageError: the stage has no such metric.
        """
        for watcher in console_watchers:
            watcher.trial_started(proposal)
        earlier = self._earlier.get(proposal.number)
        if earlier is not None and earlier.status == "pruned" and self._prune:
            trial = earlier
        else:
            trial = self._run_seeds(proposal, observer)
        self._keep(trial)
        self.tried.add(trial.number)
        for watcher in console_watchers:
            watcher.trial_finished(trial, self.result)
        return trial

    def finish(self) -> Choice:
        """The choice among the trials.

        Raises:
            NothingPasses: none of them passes the gate.
            PosttrainError: no trial came to its end.
        """
        if self.result.choice is None:
            if any(trial.value is not None for trial in self.result.trials):
                raise NothingPasses(headline(self.result))
            last = next((t.message for t in reversed(self.result.trials) if t.message), "")
            raise PosttrainError(f"no trial of the sweep came to its end; the last one: {last}")
        return self.result.choice

    def record(self, artifacts: Mapping[str, Artifact]) -> None:
        """Protect all that the sweep uses from garbage collection.

        One record for all trials, beside those of the recipe: a sweep of twenty trials must not
        push the recipe's own last runs out of the number that is kept.
        """
        self._kept |= {name: artifact.fingerprint for name, artifact in artifacts.items()}
        record = {
            "recipe": f"{self.pipeline.recipe.name} (sweep)",
            "started": self.started.isoformat(),
            "artifacts": self._kept,
            "mlflow_run_id": self.tracker.run_id,
            "prefect_run_id": self.prefect_run_id,
        }
        self.home.store.record_run(f"{self.started:%Y%m%dT%H%M%S}-{self.id}", record)

    # How it is done

    def _run_seeds(self, proposal: Proposal, observer: Callable[[], StageObserver]) -> Trial:
        runs: list[TrialRun] = []
        for seed in self.plan.seeds_of_a_trial():
            # Only the first seed is measured against other trials: their curves are of that seed.
            runs.append(self._run_once(proposal, seed, observer, prune=self._prune and not runs))
            if runs[-1].status != "complete":
                break
        values = [run.value for run in runs if run.value is not None]
        status = runs[-1].status
        return Trial(
            number=proposal.number,
            values=dict(proposal.values),
            status=status,
            value=sum(values) / len(values) if status == "complete" else None,
            runs=tuple(runs),
        )

    def _run_once(
        self,
        proposal: Proposal,
        seed: int | None,
        observer: Callable[[], StageObserver],
        *,
        prune: bool,
    ) -> TrialRun:
        overrides = self.plan.overrides_of(proposal.values, seed)
        try:
            pipeline = self.plan.open_trial(proposal.values, seed, self.home.store)
        except RecipeError as error:  # values that were drawn and do not go together
            return TrialRun(seed=seed, overrides=overrides, status="failed", message=str(error))
        trial = self._trial(proposal, seed, pipeline, prune)
        begin = time.monotonic()
        status: TrialStatus = "complete"
        message = ""
        trial.open_in(self.tracker.run_id, proposal.number, proposal.values, seed)
        try:
            with trial:
                for step in self.plan.own_steps(pipeline):
                    trial.execute(step, [observer()])
        except TrialPruned as stop:
            status, message = "pruned", str(stop)
        except StageFailed as error:
            status, message = "failed", str(error)
        done = TrialRun(
            seed=seed,
            overrides=overrides,
            status=status,
            fingerprint=trial.watch.fingerprint,
            losses=trial.watch.curve.losses,
            seconds=round(time.monotonic() - begin, 1),
            mlflow_run_id=trial.tracker.run_id,
            message=message,
        )
        return self._with_result(done, trial) if status == "complete" else done

    def _trial(
        self, proposal: Proposal, seed: int | None, pipeline: Pipeline, prune: bool
    ) -> TrialPipeline:
        name = proposal.label if seed is None else f"{proposal.label}, seed {seed}"
        others = [trial for trial in self.result.trials if trial.number != proposal.number]
        give_up = (lambda losses: study.hopeless(losses, others)) if prune else None
        return TrialPipeline(
            self.home,
            pipeline,
            name=name,
            shared=self.outcomes,
            watch=ObjectiveWatch(self.plan.objective.step, self.home.store, give_up),
            on_record=lambda found: self.record({f"{k} ({name})": v for k, v in found.items()}),
        )

    def _with_result(self, run: TrialRun, trial: TrialPipeline) -> TrialRun:
        """What the artifacts of a complete trial say, whenever they were made."""
        own = [trial.outcomes[step.name] for step in self.plan.own_steps(trial.pipeline)]
        objective = self.plan.objective
        found = measure(objective.step, objective.metric, objective.gate, trial.artifacts)
        self._what = found.what
        return run.model_copy(
            update={
                "reused": all(outcome.status == "reused" for outcome in own),
                "value": found.value,
                "verdict": found.verdict,
                "artifact": str(trial.artifacts[objective.step].path),
                "seconds": round(sum(o.artifact.manifest.seconds for o in own), 1),
            }
        )

    def _keep(self, trial: Trial) -> None:
        """Put the trial on record, choose anew, and write both files."""
        trials = {known.number: known for known in self.result.trials} | {trial.number: trial}
        objective = self.plan.objective
        compared = with_comparisons(
            [trials[number] for number in sorted(trials)],
            objective.maximize,
            rows=objective.is_held_out_loss,
        )
        pick = choose(compared, objective.maximize)
        self.result = self.result.model_copy(
            update={
                "trials": compared,
                "choice": self._choice(pick, compared) if pick else None,
                "notes": _notes(compared, objective.name, self._what),
            }
        )
        self.result.write(self.folder)
        write_bytes(self.page, page_html(self.result).encode())

    def _choice(self, pick: Pick, trials: Sequence[Trial]) -> Choice:
        values = next(trial.values for trial in trials if trial.number == pick.number)
        sets = [
            *self.plan.request.overrides,
            *(override(key, value) for key, value in values.items()),
        ]
        words = ["posttrain", "run", str(self.plan.request.file)]
        words += [word for text in sets for word in ("--set", text)]
        return Choice(
            number=pick.number,
            values=values,
            best=pick.best,
            rule=pick.rule,
            reason=pick.reason,
            command=shlex.join(words),
        )

    def _log_result(self) -> None:
        """What was swept and chosen, and both files, on the sweep's run in MLflow."""
        choice = self.result.choice
        params = {"over": " ".join(self.plan.request.over), "objective": self.plan.objective.name}
        tags: dict[str, str] = {}
        metrics: dict[str, float] = {}
        if choice is not None:
            chosen = {tracked_key(key): show_value(value) for key, value in choice.values.items()}
            params |= {f"chosen.{key}": value for key, value in chosen.items()}
            tags |= {f"chosen.{key}": value for key, value in chosen.items()}
            tags["choice"] = choice.reason
            values = {trial.number: trial.value for trial in self.result.trials}
            found = {"chosen": values[choice.number], "best": values[choice.best]}
            metrics = {
                f"{word}.{self.plan.objective.name}": value
                for word, value in found.items()
                if value is not None
            }
        files = [self.folder / name for name in (RECORD, PAGE) if (self.folder / name).exists()]
        self.tracker.annotate(params=params, tags=tags, metrics=metrics, files=files)


def new_record(plan: SweepPlan) -> SweepRecord:
    """Of a sweep that has not begun."""
    return SweepRecord(
        recipe=plan.pipeline.recipe.name,
        file=str(plan.request.file),
        overrides=plan.request.overrides,
        over=plan.request.over,
        keys=plan.space.keys,
        objective=plan.objective.name,
        maximize=plan.objective.maximize,
        gate=plan.objective.gate,
        seeds=plan.request.seeds,
        planned=plan.trials,
        shared=plan.shared,
    )


def _notes(trials: Sequence[Trial], objective: str, what: str) -> tuple[str, ...]:
    """What a reader of the table should know."""
    notes = [f"{objective}: {what}."] if what else []
    if on_other_rows(trials):
        notes.append(
            "The trials were measured on different held-out rows or tokens: their losses cannot be "
            "compared with each other."
        )
    return tuple(notes)
