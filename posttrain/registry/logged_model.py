"""MLflow's LoggedModel of an artifact: what a version points to. No weights are copied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.home import Home
from posttrain.registry.entry import DIGEST, FINGERPRINT, PATH
from posttrain.registry.queries import is_missing
from posttrain.store import Artifact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def logged_model(client: MlflowClient, home: Home, model: Artifact) -> str:
    """Id of the LoggedModel: of the run that made the artifact, else a new one.

    There is none where the run was not tracked, or by another server.
    """
    run = _run(client, model.manifest.mlflow_run_id)
    experiment = run.info.experiment_id if run else _experiment(client, home, model.manifest.recipe)
    # Else one of another run that made the same, or of a killed attempt to register it.
    same = f"tags.`{FINGERPRINT}` = '{model.fingerprint}'"
    known = client.search_logged_models([experiment], filter_string=same)
    of_the_run = [one for one in known if run and one.source_run_id == run.info.run_id]
    found = [*of_the_run, *known]
    return str(found[0].model_id) if found else _create(model, experiment, run)


def _create(model: Artifact, experiment: str, run: Run | None) -> str:
    import mlflow

    made = mlflow.create_external_model(
        name=f"{model.manifest.recipe}-{model.manifest.name}",
        source_run_id=run.info.run_id if run else None,
        experiment_id=experiment,
        model_type=model.kind,
        tags={FINGERPRINT: model.fingerprint, DIGEST: model.digest, PATH: str(model.path)},
    )
    return str(made.model_id)


def _run(client: MlflowClient, run_id: str | None) -> Run | None:
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if is_missing(error):
            return None
        raise


def _experiment(client: MlflowClient, home: Home, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = home.tracking_uri.startswith("sqlite:")
    location = (home.mlflow_artifacts / name).as_uri() if local else None
    return str(client.create_experiment(name, location))
