"""What a metric is given, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Tell = Callable[[int, int], None]
"""Told how much of the scoring is done, and of how much."""


@dataclass(frozen=True)
class Case:
    """A reference, and what the model wrote to the prompt."""

    answers: tuple[str, ...]
    """The greedy one alone, unless the metric asks for samples. Nothing at the ends is stripped."""
    reference: str


@dataclass(frozen=True)
class Scores:
    """Of all cases, in their order."""

    values: tuple[float, ...]
    """What counts, in [0, 1], more is better."""
    also: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Further scores of each case, by name."""
    corpus: Mapping[str, float] = field(default_factory=dict)
    """What only all cases together have, by name."""


class Metric(Protocol):
    """Scores answers against references."""

    packages: tuple[str, ...]
    """Distributions whose version may change a score."""

    def refuse(self, reference: str) -> str | None:
        """Why this cannot be a reference, in words that follow `the reference ...`; else None."""

    def score(self, cases: Sequence[Case], tell: Tell) -> Scores:
        """Score all cases; at least one.

        Raises:
            DataError: the metric's settings cannot be applied to an answer.
        """


def share(values: Sequence[float | bool]) -> float:
    """Their mean."""
    return sum(values) / len(values)
