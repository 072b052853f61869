"""Answers to held-out prompts at one step of a training stage, each with what it is worth.

A look is a Parquet file with one line an answer, in the order of the prompts:

    id      the row that the prompt is from
    step    optimizer step; 0 is before training
    answer  its text
    tokens  its length
    ended   whether it ended by itself
    kl      sum over its tokens of log pi - log ref, in nats
    reward  the weighted sum of the terms
    terms   each term before its weight, as JSON by name
    judge   the watch's judge's score; null without a judge
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.errors import DataError
from posttrain.store.files import temporary_beside

_NAME = re.compile(r"look-(\d+)\.parquet")


@dataclass(frozen=True)
class Look:
    """The answers at one step; all arrays are of shape (answers,)."""

    step: int
    ids: tuple[str, ...]
    answers: tuple[str, ...]
    tokens: np.ndarray
    """Length of each answer, int64."""
    ended: np.ndarray
    """Whether it ended by itself, bool."""
    kl: np.ndarray
    """Nats, float64: the sum over its tokens of log pi - log ref."""
    reward: np.ndarray
    """The weighted sum of the terms, float64."""
    terms: dict[str, np.ndarray]
    """Each term before its weight, by name."""
    judge: np.ndarray | None
    """The judge's scores, if there is a judge."""

    def __len__(self) -> int:
        return len(self.ids)


def keep_look(look: Look, folder: Path) -> None:
    """Write `look-STEP.parquet`, in place of one of an earlier attempt."""
    write_looks([look], folder / f"look-{look.step}.parquet")


def read_looks(folder: Path) -> list[Look]:
    """The looks that were kept in a folder, by step.

    Raises:
        DataError: they are not all of the same prompts.
    """
    looks = [_read(path) for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    looks.sort(key=lambda look: look.step)
    for look in looks[1:]:
        if look.ids != looks[0].ids:
            raise DataError(
                f"the answers at step {look.step} are not to the prompts of step {looks[0].step}; "
                f"remove {folder} and train again"
            )
    return looks


def write_looks(looks: Sequence[Look], path: Path) -> None:
    """Several looks as one file, one after the other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row for look in looks for row in _rows(look)]
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("step", pa.int64()),
            ("answer", pa.string()),
            ("tokens", pa.int64()),
            ("ended", pa.bool_()),
            ("kl", pa.float64()),
            ("reward", pa.float64()),
            ("terms", pa.string()),
            ("judge", pa.float64()),
        ]
    )
    with temporary_beside(path) as temporary:
        table = pa.Table.from_pylist(rows, schema)
        pq.write_table(table, temporary, compression="zstd", version="2.6")


def _rows(look: Look) -> list[dict[str, Any]]:
    return [
        {
            "id": look.ids[number],
            "step": look.step,
            "answer": look.answers[number],
            "tokens": int(look.tokens[number]),
            "ended": bool(look.ended[number]),
            "kl": float(look.kl[number]),
            "reward": float(look.reward[number]),
            "terms": json.dumps({name: float(v[number]) for name, v in look.terms.items()}),
            "judge": None if look.judge is None else float(look.judge[number]),
        }
        for number in range(len(look))
    ]


def _read(path: Path) -> Look:
    import pyarrow.parquet as pq

    columns = pq.read_table(path).to_pydict()
    terms = [json.loads(text) for text in columns["terms"]]
    judged = [score for score in columns["judge"] if score is not None]
    step = _NAME.fullmatch(path.name)
    assert step is not None
    return Look(
        step=int(step[1]),
        ids=tuple(columns["id"]),
        answers=tuple(columns["answer"]),
        tokens=np.array(columns["tokens"], np.int64),
        ended=np.array(columns["ended"], bool),
        kl=np.array(columns["kl"], np.float64),
        reward=np.array(columns["reward"], np.float64),
        terms={name: np.array([term[name] for term in terms]) for name in (terms or [{}])[0]},
        judge=np.array(judged, np.float64) if judged else None,
    )
