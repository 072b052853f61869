"""Evening out how often labels occur among the training rows, by leaving rows out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from posttrain.data.batch import RowBatch
from posttrain.data.text import normalise
from posttrain.errors import DataError
from posttrain.recipe.prepare import Balance

MAX_LABELS = 1_000
"""More distinct values than this are no labels but texts."""


def labels_of(batch: RowBatch, config: Balance) -> list[str | None]:
    """The label of each row; None for a row without one, which is never left out."""
    match config.by:
        case "answer":
            return [normalise(answer, ignore_case=True) for answer in batch.answers]
        case "label":
            if batch.family != "kto":
                raise DataError(
                    f"balance.by: `label` is KTO's; rows of {batch.family} have none, so name "
                    "`category`, `answer`, `file` or `subject`"
                )
            return [str(value) for value in batch.table.column("label").to_pylist()]
        case column:
            values: list[str | None] = batch.table.column(column).to_pylist()
            return values


def wanted_sizes(counts: Counter[str], config: Balance) -> dict[str, int]:
    """How many rows of each label stay.

    With a temperature T the shares become n ** (1 / T), scaled so that no label needs more rows
    than it has (Raffel et al. 2020, arXiv:1910.10683, section 3.5.2, mixes tasks by this rule).

    Raises:
        DataError: no row has a label, or there are too many labels.
    """
    if not counts:
        raise DataError(
            f"balance.by: no training row has a `{config.by}`; name a column of the source as "
            "`columns: {category: ...}` of the dataset"
        )
    if len(counts) > MAX_LABELS:
        raise DataError(
            f"balance.by: `{config.by}` has {len(counts):,} different values, so it is no label; "
            "balance by something with fewer"
        )
    if config.cap is not None:
        return {label: min(count, config.cap) for label, count in counts.items()}
    assert config.temperature is not None
    flat = {label: count ** (1 / config.temperature) for label, count in counts.items()}
    scale = min(counts[label] / share for label, share in flat.items())
    return {label: max(1, round(share * scale)) for label, share in flat.items()}


def left_out(
    labels: Sequence[str | None], order: np.ndarray, config: Balance
) -> tuple[np.ndarray, Counter[str], dict[str, int]]:
    """Which rows go.

    Args:
        labels: One a row.
        order: A number a row that depends on its content; of each label the smallest stay.
        config: How to balance.

    Returns:
        A mask of the rows to leave out, the count of each label, and the counts that stay.
    """
    counts = Counter(label for label in labels if label is not None)
    sizes = wanted_sizes(counts, config)
    goes = np.zeros(len(labels), bool)
    seen: Counter[str] = Counter()
    for row in np.argsort(order, kind="stable"):
        label = labels[row]
        if label is None:
            continue
        seen[label] += 1
        goes[row] = seen[label] > sizes[label]
    return goes, counts, sizes
