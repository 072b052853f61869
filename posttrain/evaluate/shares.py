"""Means and shares of few cases, with what is known of them. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054
"""95% of a normal distribution lies within so many standard deviations."""


@dataclass(frozen=True)
class Share:
    """A share of cases with its 95% interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, cases: int) -> Share:
    """A share with its 95% score interval (Wilson, 1927, doi:10.1080/01621459.1927.10502953).

    Args:
        successes: A tie counts half.
        cases: At least 1.
    """
    share, z2 = successes / cases, _Z**2
    middle = (share + z2 / (2 * cases)) / (1 + z2 / cases)
    spread = share * (1 - share) / cases + z2 / (4 * cases**2)
    half = _Z * math.sqrt(spread) / (1 + z2 / cases)
    return Share(share, max(0.0, middle - half), min(1.0, middle + half))


def mean(values: Sequence[float]) -> float:
    """Mean of at least one value, rounded once."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the values' own spread; None for a single one."""
    n = len(values)
    if n < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (n - 1) / n)
