"""Which items of two evaluations are the same question."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.errors import DataError
from posttrain.evaluate.items import Item

Pair = tuple[Item, Item]
"""An item answered by the base, or before, and by the candidate, or after."""


def paired_items(base: Sequence[Item], candidate: Sequence[Item]) -> dict[str, list[Pair]]:
    """Pairs of equal items by task.

    Raises:
        DataError: an item of one evaluation is missing from the other, or is another question.
    """
    theirs = {(item.task, item.group, item.item_id): item for item in candidate}
    pairs: dict[str, list[Pair]] = {}
    for item in base:
        other = theirs.pop((item.task, item.group, item.item_id), None)
        if other is None or other.item_digest != item.item_digest or other.metric != item.metric:
            raise DataError(
                f"item {item.item_id} of `{item.group}` is not the same question in base and "
                "candidate; the benchmark or the dataset changed between the two evaluations, so "
                "evaluate both again"
            )
        pairs.setdefault(item.task, []).append((item, other))
    if theirs:
        task, group, item_id = next(iter(theirs))
        raise DataError(
            f"item {item_id} of `{group}` (task `{task}`) was asked of the candidate and not "
            "of the base; evaluate both again"
        )
    return pairs
