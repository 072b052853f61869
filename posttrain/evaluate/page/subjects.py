"""Scores by subject, for groups such as MMLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.evaluate.page.differences import mcnemar
from posttrain.evaluate.page.measured import Measured
from posttrain.evaluate.page.text import plain_name
from posttrain.evaluate.pairing import Pair, paired_items
from posttrain.evaluate.statistics import holm

_MOST = 120
"""Subjects shown; of more, those that changed most."""


@dataclass(frozen=True)
class Subject:
    """One leaf task, before and after."""

    name: str
    n: int
    before: float
    after: float
    champion: float | None
    became_right: int
    became_wrong: int
    shown: bool
    """Whether the change stands alone: exact McNemar, corrected by Holm for all subjects."""

    @property
    def difference(self) -> float:
        """After minus before."""
        return self.after - self.before


@dataclass(frozen=True)
class Subjects:
    """The subjects of one task, the greatest gain first."""

    task: str
    metric: str
    subjects: tuple[Subject, ...]
    total: int

    @property
    def up(self) -> int:
        """Subjects that rose."""
        return sum(one.difference > 0 for one in self.subjects)

    @property
    def down(self) -> int:
        """Subjects that fell."""
        return sum(one.difference < 0 for one in self.subjects)

    @property
    def shown(self) -> int:
        """Subjects whose change stands alone."""
        return sum(one.shown for one in self.subjects)


def by_subject(
    before: Measured, after: Measured, champion: Measured | None, alpha: float = 0.05
) -> list[Subjects]:
    """For each task that has several groups, its groups.

    Raises:
        DataError: the two did not answer the same items.
    """
    found = []
    for name, task in before.tasks.items():
        pairs = paired_items(before.items.get(name, []), after.items.get(name, []))
        groups: dict[str, list[Pair]] = {}
        for pair in pairs.get(name, []):
            groups.setdefault(pair[0].group, []).append(pair)
        if len(groups) < 2:
            continue
        p_values = [mcnemar(group) for group in groups.values()]
        known = [1.0 if p is None else p for p in p_values]
        theirs = _means(champion, name)
        every = [
            _subject(name, group, pairs_of, theirs.get(group), shown)
            for (group, pairs_of), shown in zip(groups.items(), holm(known, alpha), strict=True)
        ]
        kept = sorted(every, key=lambda one: (-abs(one.difference), one.name))[:_MOST]
        ordered = sorted(kept, key=lambda one: (-one.difference, one.name))
        found.append(Subjects(name, task.metric, tuple(ordered), len(every)))
    return found


def _means(measured: Measured | None, task: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for item in measured.items.get(task, []) if measured else []:
        values.setdefault(item.group, []).append(item.value)
    return {group: sum(scores) / len(scores) for group, scores in values.items()}


def _subject(
    task: str, group: str, pairs: Sequence[Pair], champion: float | None, shown: bool
) -> Subject:
    return Subject(
        name=plain_name(group, task),
        n=len(pairs),
        before=sum(first.value for first, _ in pairs) / len(pairs),
        after=sum(second.value for _, second in pairs) / len(pairs),
        champion=champion,
        became_right=sum(second.value > first.value for first, second in pairs),
        became_wrong=sum(second.value < first.value for first, second in pairs),
        shown=shown,
    )
