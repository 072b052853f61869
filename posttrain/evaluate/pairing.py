"""Which items of two evaluations are the same question, and whether the two can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from posttrain.errors import DataError
from posttrain.evaluate.items import (
    Item,
    PerplexityRow,
    read_items,
    read_perplexity,
)
from posttrain.evaluate.results import EvaluationResults

Pair = tuple[Item, Item]
"""An item answered by the base, or before, and by the candidate, or after."""


@dataclass(frozen=True)
class Evaluation:
    """All of one evaluation, read once."""

    label: str
    """What messages call its model: `base`, `candidate`, `champion NAME` or a stage's name."""
    results: EvaluationResults
    items: Sequence[Item]
    rows: Sequence[PerplexityRow]

    @classmethod
    def read(cls, folder: Path, label: str) -> Self:
        """Read an evaluation's folder.

        Raises:
            DataError: the folder holds no evaluation that this version can read.
        """
        results = EvaluationResults.load(folder)
        return cls(label, results, read_items(folder), read_perplexity(folder))


def check_comparable(first: Evaluation, second: Evaluation) -> None:
    """Refuse two evaluations that did not ask the same in the same way.

    Raises:
        DataError: their settings differ; all that differ are named.
    """
    if first.results.settings_digest == second.results.settings_digest:
        return
    differences = first.results.settings.differences(second.results.settings)
    lines = "".join(f"\n  {line}" for line in differences)
    raise DataError(
        f"{first.label} and {second.label} were evaluated with different settings, so their "
        f"difference would mean nothing; evaluate both with the same recipe ({first.label} first "
        f"below):{lines}"
    )


def paired_items(
    base: Sequence[Item],
    candidate: Sequence[Item],
    labels: tuple[str, str] = ("base", "candidate"),
) -> dict[str, list[Pair]]:
    """Pairs of equal items by task.

    Args:
        base: Items of the one evaluation.
        candidate: Items of the other.
        labels: What messages call the two.

    Raises:
        DataError: an item of one evaluation is missing from the other, or is another question.
    """
    theirs = {(item.task, item.group, item.item_id): item for item in candidate}
    pairs: dict[str, list[Pair]] = {}
    for item in base:
        other = theirs.pop((item.task, item.group, item.item_id), None)
        if other is None or other.item_digest != item.item_digest or other.metric != item.metric:
            raise DataError(
                f"item {item.item_id} of `{item.group}` is not the same question in {labels[0]} "
                f"and {labels[1]}; the benchmark or the dataset changed between the two "
                "evaluations, so evaluate both again"
            )
        pairs.setdefault(item.task, []).append((item, other))
    if theirs:
        task, group, item_id = next(iter(theirs))
        raise DataError(
            f"item {item_id} of `{group}` (task `{task}`) was asked of the {labels[1]} and not "
            f"of the {labels[0]}; evaluate both again"
        )
    return pairs
