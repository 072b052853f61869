"""Held-out rows: their loss in all, by task and by row.

`held_out.parquet` of a trained artifact has one line a row, from the checkpoint that was kept:

    id      the row's id, as in the dataset's ledger
    task    the dataset that the row comes from; of a mix, one of those mixed
    tokens  tokens that are trained on
    nll     sum of their negative log-likelihoods, in nats
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from posttrain.data.rows import Row
from posttrain.store.files import write_bytes
from posttrain.train.tables import TrainingTable

HELD_OUT_ROWS = "held_out.parquet"
"""File of a trained artifact that has the held-out loss of each row."""


@dataclass(frozen=True)
class HeldOut:
    """The rows that a model is measured on while it is trained."""

    rows: Sequence[Row]
    table: TrainingTable
    """One sequence an entry; entries without a row fill the table up."""
    task_names: Sequence[str]
    tasks: Sequence[int]
    """Task of each row."""

    def losses(self, likelihoods: np.ndarray, prefix: str) -> dict[str, float]:
        """Nats a trained token, over all rows and, where there are several, for each task.

        Args:
            likelihoods: Negative log-likelihood of each entry, float64 of shape (entries,).
            prefix: Begins the names: `eval` makes `eval_loss` and `eval_loss/TASK`.
        """
        nll, tokens = self.by_row(likelihoods)
        losses = {f"{prefix}_loss": float(nll.sum() / tokens.sum())}
        if len(self.task_names) > 1:
            tasks = np.array(self.tasks)
            for number, name in enumerate(self.task_names):
                mine = tasks == number
                # MLflow takes fewer characters in a metric's name than a recipe in a dataset's.
                metric = re.sub(r"[^\w.-]", "_", name)
                losses[f"{prefix}_loss/{metric}"] = float(nll[mine].sum() / tokens[mine].sum())
        return losses

    def by_row(self, likelihoods: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihood and trained tokens of each row, over all of its sequences."""
        nll, tokens = np.zeros(len(self.rows)), np.zeros(len(self.rows), np.int64)
        for entry, members in enumerate(self.table.rows):
            for row in members:
                nll[row] += likelihoods[entry]
                tokens[row] += self.table.trained[entry]
        return nll, tokens

    def keep(self, likelihoods: np.ndarray, folder: Path, step: int) -> None:
        """Remember an evaluation, for the account of the step that turns out to be the best."""
        file = io.BytesIO()
        np.save(file, likelihoods)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / _file(step), file.getvalue())

    def write_account(self, checkpoints: Path, step: int, path: Path) -> None:
        """Leave the account of the rows at a step; its columns stand at the head of this module."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        nll, tokens = self.by_row(np.load(checkpoints / _file(step)))
        columns = {
            "id": pa.array([row.id for row in self.rows], pa.string()),
            "task": pa.array([self.task_names[task] for task in self.tasks], pa.string()),
            "tokens": pa.array(tokens, pa.int64()),
            "nll": pa.array(nll, pa.float64()),
        }
        pq.write_table(pa.table(columns), path, compression="zstd", version="2.6")


def _file(step: int) -> str:
    return f"held_out-{step}.npy"
