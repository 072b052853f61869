"""Held-out answers: how likely each is, and what the method makes of it, in all and by row.

`held_out.parquet` of an artifact that was trained on answers has one line a pair or marked answer,
from the checkpoint that was kept:

    id                  the row's id, as in the dataset's ledger
    task                the dataset that the row comes from; of a mix, one of those mixed
    chosen_logp         log-probability of the chosen answer in nats, the sum over its tokens
    rejected_logp       the same of the rejected one
    reference_...       both under the reference, where the method has one
    ..._mean_logp       both divided by their answer's tokens, for `orpo`, which compares these
    chosen_reward       what the method takes for the answer's reward: beta times its log-ratio to
    rejected_reward     the reference; for `orpo` beta times its mean log-probability
    margin              chosen_reward less rejected_reward

and of marked answers, in place of all from `chosen_logp` on, `label` (whether it is wanted),
`logp`, `reference_logp` and `reward`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from posttrain.data.rows import Row
from posttrain.store.files import write_bytes
from posttrain.train.pairs import AnswerTable

Scores = Mapping[str, np.ndarray]
"""Numbers of each entry by name, float64 of shape (entries,). `loss` is the mean loss of the pass
that the entry was in, and so over all entries of a side the mean of their losses."""


@dataclass(frozen=True)
class HeldOutAnswers:
    """The answers that a model is measured on while it is trained."""

    rows: Sequence[Row]
    table: AnswerTable
    """One pair or answer an entry; nothing fills it up."""
    task_names: Sequence[str]
    tasks: Sequence[int]
    """Task of each row."""

    def metrics(self, scores: Scores, prefix: str) -> dict[str, float]:
        """Loss and rewards over all entries, by TRL's names, and the loss of each task.

        Args:
            scores: Of each entry.
            prefix: Begins the names: `eval` makes `eval_loss` and `eval_loss/TASK`.
        """
        found = {"loss": float(scores["loss"].mean())}
        if len(self.task_names) > 1:
            tasks = self._task_of_entries()
            for number, name in enumerate(self.task_names):
                mine = scores["loss"][tasks == number]
                if len(mine):
                    # MLflow takes fewer characters in a metric's name than a recipe in a dataset's.
                    metric = re.sub(r"[^\w.-]", "_", name)
                    found[f"loss/{metric}"] = float(mine.mean())
        found |= _of_marked(scores) if "label" in scores else _of_pairs(scores)
        return {f"{prefix}_{name}": value for name, value in found.items()}

    def keep(self, scores: Scores, folder: Path, step: int) -> None:
        """Remember an evaluation, for the account of the step that turns out to be the best."""
        file = io.BytesIO()
        np.savez(file, **dict(scores))  # type: ignore[arg-type]  # numpy takes any names
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / _file(step), file.getvalue())

    def kept(self, folder: Path, step: int) -> dict[str, np.ndarray]:
        """What `keep` remembered."""
        with np.load(folder / _file(step)) as file:
            return {name: file[name] for name in file.files}

    def write_account(self, scores: Scores, path: Path) -> None:
        """Leave the account of the rows; its columns stand at the head of this module."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = [self.task_names[task] for task in self._task_of_entries()]
        columns = {
            "id": pa.array([self.rows[row].id for (row,) in self.table.rows], pa.string()),
            "task": pa.array(names, pa.string()),
        }
        for name, values in scores.items():
            if name == "label":
                columns[name] = pa.array(values > 0, pa.bool_())
            elif name != "loss":
                columns[name] = pa.array(values, pa.float64())
        if "chosen_reward" in scores:
            columns["margin"] = pa.array(
                scores["chosen_reward"] - scores["rejected_reward"], pa.float64()
            )
        pq.write_table(pa.table(columns), path, compression="zstd", version="2.6")

    def _task_of_entries(self) -> np.ndarray:
        return np.array([self.tasks[row] for (row,) in self.table.rows])


def _of_pairs(scores: Scores) -> dict[str, float]:
    chosen, rejected = scores["chosen_reward"], scores["rejected_reward"]
    # What TRL calls `logps` is a mean over tokens where the method compares means.
    kind = "mean_logp" if "chosen_mean_logp" in scores else "logp"
    return {
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "rewards/accuracies": float((chosen > rejected).mean()),
        "logps/chosen": float(scores[f"chosen_{kind}"].mean()),
        "logps/rejected": float(scores[f"rejected_{kind}"].mean()),
    }


def _of_marked(scores: Scores) -> dict[str, float]:
    """Rewards of wanted and unwanted answers apart, as far as there are any."""
    found = {}
    wanted = scores["label"] > 0
    for name, mine in (("chosen", wanted), ("rejected", ~wanted)):
        if mine.any():
            found[f"rewards/{name}"] = float(scores["reward"][mine].mean())
            found[f"logps/{name}"] = float(scores["logp"][mine].mean())
    if len(found) == 4:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


def _file(step: int) -> str:
    return f"held_out-{step}.npz"
