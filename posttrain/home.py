"""Where posttrain keeps things: one folder with the store, the tracking database and its files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from posttrain.store import Store

HOME_VARIABLE = "POSTTRAIN_HOME"


@dataclass(frozen=True)
class Home:
    """`POSTTRAIN_HOME`, by default `.posttrain` in the working directory."""

    root: Path

    @classmethod
    def find(cls) -> Home:
        """The folder named by the environment, or the default."""
        return cls(Path(os.environ.get(HOME_VARIABLE) or ".posttrain").expanduser().resolve())

    @property
    def store(self) -> Store:
        """The artifact store."""
        return Store(self.root / "store")

    @property
    def tracking_uri(self) -> str:
        """`MLFLOW_TRACKING_URI` where it is set, else a SQLite file in this folder."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        """Files that runs log to MLflow when no server is configured."""
        return self.root / "mlflow-artifacts"
