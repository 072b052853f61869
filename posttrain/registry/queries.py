"""Questions to MLflow whose answer may be that there is no such thing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

_MISSING = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


def model_named(client: MlflowClient, name: str) -> RegisteredModel | None:
    """The registered model with its aliases and tags, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if is_missing(error):
            return None
        raise


def version_of(client: MlflowClient, name: str, number: int) -> ModelVersion | None:
    """One version with its tags, or None where it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, str(number))
    except MlflowException as error:
        if is_missing(error):
            return None
        raise


def all_models(client: MlflowClient) -> list[RegisteredModel]:
    """All registered models, by name."""
    page = client.search_registered_models()
    found = list(page)
    while page.token:
        page = client.search_registered_models(page_token=page.token)
        found += page
    return sorted(found, key=lambda model: str(model.name))


def versions_of(
    client: MlflowClient, name: str, tag: tuple[str, str] | None = None
) -> list[ModelVersion]:
    """All versions of a registered model, first to last; with a tag, those that have it."""
    quote = '"' if "'" in name else "'"  # MLflow's filters have no escape
    condition = f"name = {quote}{name}{quote}"
    if tag is not None:
        condition += f" and tags.`{tag[0]}` = '{tag[1]}'"
    page = client.search_model_versions(condition)
    found = list(page)
    while page.token:
        page = client.search_model_versions(condition, page_token=page.token)
        found += page
    return sorted(found, key=lambda version: int(version.version))


def is_missing(error: Exception) -> bool:
    """Whether MLflow says that what was asked for does not exist."""
    return getattr(error, "error_code", "") in _MISSING
