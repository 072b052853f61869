"""A client of MLflow's registry, patient for a stated time, whose errors say what to do."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from posttrain.errors import StoreError
from posttrain.home import Home

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRACKING_URI = "MLFLOW_TRACKING_URI"

HASTY = 2
"""Retries of one request while somebody waits: about five seconds."""
PATIENT = 5
"""Retries of one request at the end of a run: about a minute, doubling from four seconds."""

_TIMEOUT_S = 30
_SQLITE = "sqlite:///"


def nothing_tracked(home: Home) -> bool:
    """Whether the tracking database is a file that does not exist yet: then nothing is registered.

    Costs no import of MLflow.
    """
    uri = home.tracking_uri
    file = uri.removeprefix(_SQLITE).partition("?")[0]
    return uri.startswith(_SQLITE) and not Path(file).exists()


@contextmanager
def connected(home: Home, retries: int = HASTY) -> Iterator[MlflowClient]:
    """A client of the home's registry.

    Args:
        home: Whose tracking address is asked.
        retries: Of each request to a server, with growing pauses (`HASTY`, `PATIENT`).

    Raises:
        StoreError: the registry cannot be reached, or refuses.
    """
    uri = home.tracking_uri
    given = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": retries, "MLFLOW_HTTP_REQUEST_TIMEOUT": _TIMEOUT_S}
    defaults = {key: str(value) for key, value in given.items() if key not in os.environ}
    with _environment_restored(TRACKING_URI, *defaults):
        os.environ |= defaults
        import mlflow
        from mlflow.exceptions import MlflowException

        for name in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # MLflow looks up the model behind a version at its global address only; setting that
        # puts it into the environment as well, where the next `Home` would find it.
        mlflow.set_tracking_uri(uri)
        try:
            yield mlflow.MlflowClient(uri)
        except MlflowException as error:
            raise StoreError(_explain(uri, error)) from error
        except OSError as error:
            raise StoreError(f"the model registry at {shown(uri)}: {error}") from error


def shown(uri: str) -> str:
    """The address as it may be printed: without a password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _explain(uri: str, error: Exception) -> str:
    lines = str(error).replace(uri, shown(uri)).splitlines()
    said = lines[0][:300] if lines else type(error).__name__
    if uri.startswith("http") and "API request to" in said:
        return (
            f"the model registry at {shown(uri)} cannot be reached; start its server, or set "
            f"{TRACKING_URI} to another one"
        )
    return f"the model registry at {shown(uri)}: {said}"


@contextmanager
def _environment_restored(*names: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
