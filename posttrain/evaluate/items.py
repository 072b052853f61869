"""Single items of an evaluation, in Parquet: what the gate pairs, and what a person looks up.

`items.parquet` has one line an item, `perplexity.parquet` one line a held-out row. The order of
lines is the order of evaluation, and equal for base and candidate.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import DataError


@dataclass(frozen=True)
class Item:
    """One answered question."""

    task: str
    """Task as named in the recipe."""
    group: str
    """Leaf task, such as a subject of MMLU; the task itself where it has no subtasks."""
    item_id: int
    """Position in the benchmark's split."""
    item_digest: str
    """Digest of the item's content, prompt and target: equal digests are the same question."""
    metric: str
    value: float
    """The item's score by `metric`."""
    metrics: dict[str, float]
    """All scores of the item."""
    log_likelihoods: tuple[float, ...]
    """Of each answer, in nats; empty for generated answers."""
    question: str = ""
    """What was asked, without examples and chat template."""
    choices: tuple[str, ...] = ()
    """The answers to choose from; empty for generated answers."""
    target: str = ""
    """The right answer, or the reference."""
    answer: str = ""
    """The model's: the choice that its metric counts, or what it wrote."""


@dataclass(frozen=True)
class PerplexityRow:
    """One held-out row under the model."""

    id: str
    nats: float
    """Summed negative log-likelihood of the scored tokens."""
    tokens: int
    bytes: int
    dataset: str = ""
    """Name of the dataset that it is held out of; empty where the recipe does not name it."""
    group: str = ""
    """Task, or dataset of a mix, that it belongs to; empty where there is only one."""


def write_items(folder: Path, items: Sequence[Item]) -> None:
    """Write `items.parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "task": pa.array([item.task for item in items], pa.string()),
            "group": pa.array([item.group for item in items], pa.string()),
            "item_id": pa.array([item.item_id for item in items], pa.int64()),
            "item_digest": pa.array([item.item_digest for item in items], pa.string()),
            "metric": pa.array([item.metric for item in items], pa.string()),
            "value": pa.array([item.value for item in items], pa.float64()),
            "metrics": pa.array([json.dumps(item.metrics) for item in items], pa.string()),
            "log_likelihoods": pa.array(
                [json.dumps(item.log_likelihoods) for item in items], pa.string()
            ),
            "question": pa.array([item.question for item in items], pa.string()),
            "choices": pa.array([list(item.choices) for item in items], pa.list_(pa.string())),
            "target": pa.array([item.target for item in items], pa.string()),
            "answer": pa.array([item.answer for item in items], pa.string()),
        }
    )
    pq.write_table(table, folder / "items.parquet")


def read_items(folder: Path) -> list[Item]:
    """Read `items.parquet` back.

    Raises:
        DataError: the file is missing.
    """
    return [
        Item(
            **{
                **row,
                "metrics": json.loads(row["metrics"]),
                "log_likelihoods": tuple(json.loads(row["log_likelihoods"])),
                "choices": tuple(row.get("choices") or ()),
            }
        )
        for row in _rows(folder / "items.parquet")
    ]


def write_perplexity(folder: Path, rows: Sequence[PerplexityRow]) -> None:
    """Write `perplexity.parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "id": pa.array([row.id for row in rows], pa.string()),
            "nats": pa.array([row.nats for row in rows], pa.float64()),
            "tokens": pa.array([row.tokens for row in rows], pa.int64()),
            "bytes": pa.array([row.bytes for row in rows], pa.int64()),
            "dataset": pa.array([row.dataset for row in rows], pa.string()),
            "group": pa.array([row.group for row in rows], pa.string()),
        }
    )
    pq.write_table(table, folder / "perplexity.parquet")


def read_perplexity(folder: Path) -> list[PerplexityRow]:
    """Read `perplexity.parquet` back.

    Raises:
        DataError: the file is missing.
    """
    return [PerplexityRow(**row) for row in _rows(folder / "perplexity.parquet")]


def _rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    if not path.exists():
        raise DataError(f"{path.parent}: no {path.name} in it; evaluate again")
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows
