"""MLflow: a parent run for each run of a pipeline, a nested run for each stage executed.

A stage's program knows nothing of MLflow: what it says in `events.jsonl` is logged from here. A
tracking server that cannot be reached costs a warning, never a training run.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.events import Event, Progress, Values
from posttrain.execute import Outcome, StageObserver
from posttrain.home import Home
from posttrain.pipeline import BoundStep, Pipeline, Rows, Source
from posttrain.plan import flatten
from posttrain.recipe import result_config
from posttrain.store import Artifact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

log = logging.getLogger(__name__)

PREFIX = "posttrain."
"""Of every tag that posttrain sets."""

_DIGEST_LENGTH = 36
"""MLflow keeps no more of a dataset's digest; the whole one is in a tag."""


_REFUSED = re.compile(r"[^\w.\-/: ]")
"""Characters that MLflow takes in no name of a metric or tag."""


def mlflow_name(name: str) -> str:
    """The name as MLflow takes it: `tests:pass@1` becomes `tests:pass_at_1`."""
    return _REFUSED.sub("_", name.replace("@", "_at_"))


class MlflowTracker(StageObserver):
    """Records one run of a pipeline. An observer of its stages."""

    def __init__(self, home: Home, pipeline: Pipeline) -> None:
        self._home = home
        self._pipeline = pipeline
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._children: dict[str, str] = {}
        self.run_id: str | None = None
        """The parent run's id."""

    # The pipeline's run

    def open(
        self, tags: Mapping[str, str], *, name: str | None = None, parent: str | None = None
    ) -> None:
        """Start the parent run.

        Args:
            tags: Without the prefix.
            name: What the run is called. Default: the recipe's name.
            parent: Id of the run that this one is nested in, such as a sweep's.
        """
        self._guard(self._open, tags, name, parent)

    def annotate(
        self,
        *,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        """Add parameters, tags (without the prefix), numbers and small files to the parent run."""
        self._guard(self._annotate, params or {}, tags or {}, metrics or {}, files)

    def close(self, status: str, table: str) -> None:
        """End the parent run as FINISHED, FAILED or KILLED, with the table of its stages."""
        self._guard(self._close, status, table)

    def stage_run_id(self, step: str) -> str | None:
        """The nested run of a stage that was executed now."""
        return self._children.get(step)

    def artifacts_page(self, step: str | None = None) -> str | None:
        """Address of the page with a stage's files, or the run's own, where MLflow is a server."""
        run_id = self._children.get(step) if step else self.run_id
        uri = self._home.tracking_uri
        if run_id is None or not uri.startswith("http"):
            return None
        return f"{uri.rstrip('/')}/#/experiments/{self._experiment}/runs/{run_id}/artifacts"

    # What stages tell

    def started(self, step: BoundStep) -> None:
        """Start a nested run with the stage's parameters and dataset inputs."""
        self._guard(self._started, step)

    def event(self, step: BoundStep, event: Event) -> None:
        """Log the numbers an event carries."""
        if isinstance(event, Progress) and event.unit == "step":
            self._guard(self._log_values, step, event.values, event.done)
        elif isinstance(event, Values):
            self._guard(self._log_values, step, event.values, event.step)

    def finished(self, step: BoundStep, outcome: Outcome) -> None:
        """End the nested run, or link the run that made the reused artifact."""
        if outcome.status == "ran":
            self._guard(self._finished, step, outcome.artifact)
        else:
            self._guard(self._reused, step, outcome.artifact)

    def failed(self, step: BoundStep, error: BaseException) -> None:
        """End the nested run as FAILED, or KILLED when it was stopped from outside."""
        self._guard(self._failed, step, error)

    # How it is done

    def _guard(self, do: Callable[..., None], *arguments: Any) -> None:
        """Tracking must not end a run: whatever goes wrong with it is a warning."""
        try:
            do(*arguments)
        except Exception as error:  # MLflow raises whatever its store raises
            log.warning("MLflow: %s: %s", type(error).__name__, str(error).splitlines()[0][:300])

    def _open(self, tags: Mapping[str, str], run_name: str | None, parent: str | None) -> None:
        # Read when a run ends: links in the middle of a progress bar help nobody.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        import mlflow

        uri = self._home.tracking_uri
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        mlflow.set_tracking_uri(uri)
        self._client = client = mlflow.MlflowClient(uri)
        name = self._pipeline.recipe.tracking.experiment or self._pipeline.recipe.name
        found = client.get_experiment_by_name(name)
        if found is not None:
            self._experiment = found.experiment_id
        else:
            local = uri.startswith("sqlite:")
            location = (self._home.mlflow_artifacts / name).as_uri() if local else None
            self._experiment = client.create_experiment(name, location)
        run = client.create_run(
            self._experiment,
            run_name=run_name or self._pipeline.recipe.name,
            tags={
                **{f"{PREFIX}{key}": value for key, value in tags.items()},
                **({"mlflow.parentRunId": parent} if parent else {}),
            },
        )
        self.run_id = run.info.run_id
        recipe = self._pipeline.recipe.model_dump(mode="json", exclude_defaults=True)
        client.log_dict(self.run_id, recipe, "recipe.yaml")

    def _annotate(
        self,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        metrics: Mapping[str, float],
        files: Sequence[Path],
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client, run_id = self._client, self.run_id
        if client is None or run_id is None:
            return
        moment = int(time.time() * 1000)
        client.log_batch(
            run_id,
            metrics=[Metric(mlflow_name(key), value, moment, 0) for key, value in metrics.items()],
            params=[Param(key, value[:6000]) for key, value in params.items()],
            tags=[RunTag(f"{PREFIX}{key}", value) for key, value in tags.items()],
        )
        for file in files:
            client.log_artifact(run_id, str(file))

    def _close(self, status: str, table: str) -> None:
        client, run_id = self._client, self.run_id
        if client is None or run_id is None:
            return
        client.set_tag(run_id, "mlflow.note.content", table)
        client.set_terminated(run_id, status)

    def _started(self, step: BoundStep) -> None:
        from mlflow.entities import LoggedModelInput, Param

        client = self._client
        if client is None:
            return
        run = client.create_run(
            self._experiment,
            run_name=step.step.name,
            tags={
                "mlflow.parentRunId": self.run_id,
                f"{PREFIX}stage": step.step.stage,
                f"{PREFIX}fingerprint": step.fingerprint,
                **{f"{PREFIX}input.{n}": record.digest for n, record in step.inputs.items()},
            },
        )
        run_id = self._children[step.step.name] = run.info.run_id
        params = [
            Param(key, str(value)[:6000])
            for key, value in flatten(result_config(step.step.config)).items()
        ]
        client.log_batch(run_id, params=params)
        models = [LoggedModelInput(model_id) for model_id in self._input_models(step)]
        client.log_inputs(run_id, datasets=_dataset_inputs(step), models=models or None)

    def _log_values(self, step: BoundStep, values: Mapping[str, float], at: int) -> None:
        from mlflow.entities import Metric

        run_id = self._children.get(step.step.name)
        if self._client is None or run_id is None or not values:
            return
        moment = int(time.time() * 1000)
        metrics = [Metric(mlflow_name(key), value, moment, at) for key, value in values.items()]
        self._client.log_batch(run_id, metrics=metrics)

    def _finished(self, step: BoundStep, artifact: Artifact) -> None:
        client, run_id = self._client, self._children.get(step.step.name)
        if client is None or run_id is None:
            return
        for key, value in artifact.manifest.metrics.items():
            client.log_metric(run_id, mlflow_name(key), value)
        client.set_tag(run_id, f"{PREFIX}output", artifact.digest)
        client.set_tag(run_id, f"{PREFIX}path", str(artifact.path))
        client.set_tag(run_id, "mlflow.note.content", artifact.manifest.headline)
        for name in ("manifest.json", *_small_reports(artifact)):
            client.log_artifact(run_id, str(artifact.path / name))
        if artifact.kind in ("model", "adapter", "reward"):
            self._log_model(step, artifact, run_id)
        client.set_terminated(run_id, "FINISHED")
        self._show_on_parent(step, artifact)

    def _log_model(self, step: BoundStep, artifact: Artifact, run_id: str) -> None:
        """A LoggedModel that points to the store: no weights are copied."""
        import mlflow
        from mlflow.entities import LoggedModelOutput

        model = mlflow.create_external_model(
            name=f"{self._pipeline.recipe.name}-{step.step.name}",
            source_run_id=run_id,
            experiment_id=self._experiment,
            model_type=artifact.kind,
            tags={
                f"{PREFIX}fingerprint": artifact.fingerprint,
                f"{PREFIX}digest": artifact.digest,
                f"{PREFIX}path": str(artifact.path),
            },
        )
        assert self._client is not None
        self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])

    def _reused(self, step: BoundStep, artifact: Artifact) -> None:
        """Link the run that made the artifact, so that no history is broken."""
        if self._client is None or self.run_id is None:
            return
        made_by = artifact.manifest.mlflow_run_id or "unknown"
        self._client.set_tag(self.run_id, f"{PREFIX}reused.{step.step.name}", made_by)
        self._show_on_parent(step, artifact)

    def _show_on_parent(self, step: BoundStep, artifact: Artifact) -> None:
        from mlflow.entities import Metric

        if self._client is None or self.run_id is None:
            return
        moment = int(time.time() * 1000)
        metrics = [
            Metric(mlflow_name(f"{step.step.name}.{key}"), value, moment, 0)
            for key, value in artifact.manifest.metrics.items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    def _failed(self, step: BoundStep, error: BaseException) -> None:
        from posttrain.errors import StageInterrupted

        client, run_id = self._client, self._children.get(step.step.name)
        if client is None or run_id is None:
            return
        stopped = isinstance(error, StageInterrupted) or not isinstance(error, Exception)
        client.set_tag(run_id, "mlflow.note.content", str(error)[:5000] or type(error).__name__)
        client.set_terminated(run_id, "KILLED" if stopped else "FAILED")

    def _input_models(self, step: BoundStep) -> list[str]:
        """Ids of the LoggedModels behind a step's inputs, by way of the runs that made them."""
        assert self._client is not None
        found: list[str] = []
        for source in step.sources.values():
            made_by = source.manifest.mlflow_run_id if isinstance(source, Artifact) else None
            if made_by is None or not isinstance(source, Artifact):
                continue
            if source.kind in ("model", "adapter"):
                outputs = self._client.get_run(made_by).outputs
                found += [output.model_id for output in outputs.model_outputs] if outputs else []
        return found


def _dataset_inputs(step: BoundStep) -> list[DatasetInput]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found = []
    for name, record in step.inputs.items():
        source = step.sources[name]
        if isinstance(source, Artifact) and source.kind != "dataset":
            continue
        if record.kind == "model" or name in ("weights", "benchmarks"):
            continue
        dataset = Dataset(
            name=_dataset_name(source, name),
            digest=record.digest[:_DIGEST_LENGTH],
            source_type="posttrain" if isinstance(source, Artifact) else "local",
            source=str(source.path) if isinstance(source, Artifact) else str(record.source),
        )
        tags = [InputTag("mlflow.data.context", name), InputTag("digest", record.digest)]
        found.append(DatasetInput(dataset, tags))
    return found


def _dataset_name(source: Source, default: str) -> str:
    """What the recipe calls the dataset, before and after it was prepared."""
    if isinstance(source, Rows):
        return source.name
    if isinstance(source, Artifact):
        if source.manifest.stage == "mix":
            return source.manifest.name
        return str(source.manifest.config.get("dataset", default))
    return default


_REPORT_SUFFIXES = (".json", ".md", ".html", ".png")
_OF_WEIGHTS = {
    "training.json",
    "merge.json",
    "reward.json",
    "reward.html",
    "watch.json",
    "watch.html",
}
"""Files beside weights that are worth opening."""
_REPORT_LIMIT = 2_000_000


def _small_reports(artifact: Artifact) -> list[str]:
    """Files of an artifact that are worth opening in MLflow."""
    if artifact.kind in ("model", "adapter", "reward"):
        return [file.path for file in artifact.manifest.files if file.path in _OF_WEIGHTS]
    return [
        file.path
        for file in artifact.manifest.files
        if Path(file.path).suffix in _REPORT_SUFFIXES and file.size < _REPORT_LIMIT
    ]
