"""Evaluations as the page shows them: every value with its 95% interval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.evaluate.items import Item, PerplexityRow, read_items, read_perplexity
from posttrain.evaluate.pairing import Evaluation
from posttrain.evaluate.results import EvaluationResults, PerplexityResult, TaskResult
from posttrain.evaluate.samples import Sample
from posttrain.evaluate.shares import wilson

_Z = 1.959963984540054
"""95% of a normal distribution lies within so many standard deviations."""


@dataclass(frozen=True)
class Value:
    """A task's score with its 95% interval."""

    value: float
    low: float | None
    """None for a single item that is neither right nor wrong."""
    high: float | None
    n: int


@dataclass(frozen=True)
class Measured:
    """One evaluation under the name that the page calls it by."""

    label: str
    results: EvaluationResults
    items: dict[str, list[Item]]
    """By task."""
    rows: tuple[PerplexityRow, ...]
    samples: tuple[Sample, ...]

    @classmethod
    def read(cls, label: str, folder: Path) -> Measured:
        """Read an evaluation's folder; what an older one lacks is left out.

        Raises:
            DataError: the folder holds no evaluation that this version can read.
        """
        items: dict[str, list[Item]] = {}
        for item in read_items(folder) if (folder / "items.parquet").exists() else []:
            items.setdefault(item.task, []).append(item)
        scored = read_perplexity(folder) if (folder / "perplexity.parquet").exists() else []
        samples = folder / "samples.json"
        said = json.loads(samples.read_bytes()) if samples.exists() else []
        return cls(
            label=label,
            results=EvaluationResults.load(folder),
            items=items,
            rows=tuple(scored),
            samples=tuple(Sample.model_validate(sample) for sample in said),
        )

    @property
    def tasks(self) -> dict[str, TaskResult]:
        """Its tasks by name."""
        return {task.task: task for task in self.results.tasks}

    @property
    def test_sets(self) -> tuple[str, ...]:
        """Tasks that are metrics of the user's own test sets."""
        sets = tuple(f"{one['dataset']}:" for one in self.results.settings.test_sets)
        return tuple(task for task in self.tasks if sets and task.startswith(sets))

    def value(self, task: str) -> Value | None:
        """The task's score: a share with Wilson's interval, else a mean with a normal one."""
        result = self.tasks.get(task)
        if result is None:
            return None
        scores = [item.value for item in self.items.get(task, [])]
        if scores and is_binary(scores):
            share = wilson(sum(scores), len(scores))
            return Value(result.value, share.low, share.high, result.n)
        if result.standard_error is None:
            return Value(result.value, None, None, result.n)
        half = _Z * result.standard_error
        return Value(result.value, result.value - half, result.value + half, result.n)

    @property
    def perplexities(self) -> dict[tuple[str, str], PerplexityResult]:
        """By dataset, empty for the one it is about, and group, empty for the whole dataset."""
        datasets = {"": self.results.perplexity, **self.results.other_perplexities}
        found: dict[tuple[str, str], PerplexityResult] = {}
        for dataset, result in datasets.items():
            if result is not None:
                found[dataset, ""] = result
                found |= {(dataset, group): one for group, one in result.groups.items()}
        return found

    @property
    def evaluation(self) -> Evaluation:
        """As the gate reads it."""
        items = [item for of_task in self.items.values() for item in of_task]
        return Evaluation(self.label, self.results, items, self.rows)

    def of_group(self, dataset: str, group: str) -> Evaluation:
        """The same without the held-out rows of the dataset's other groups; empty means all."""
        others = self.results.other_perplexities
        rows = [
            row
            for row in self.rows
            if (row.dataset if row.dataset in others else "") == dataset
            and group in ("", row.group)
        ]
        return Evaluation(self.label, self.results, (), rows)


def is_binary(scores: Sequence[float]) -> bool:
    """Whether all scores are right or wrong."""
    return all(score in (0.0, 1.0) for score in scores)
