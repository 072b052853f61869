"""How far raters agree beyond chance, and whether the place of an answer sways them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from posttrain.evaluate.shares import wilson

Votes = Mapping[str, Mapping[str, str]]
"""What each rater said of each item: rater -> item -> category. Items not rated are not there."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Share(_Frozen):
    """A share of counted things with its interval."""

    count: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(ge=1)]
    low: float
    """Lower end of the 95% interval."""
    high: float

    @property
    def value(self) -> float:
        """Between 0 and 1."""
        return self.count / self.of

    @property
    def excludes_half(self) -> bool:
        """Whether one half lies outside the interval."""
        return not self.low <= 0.5 <= self.high


class Kappa(_Frozen):
    """Cohen's kappa with its 95% interval: 1 is full agreement, 0 what chance would give."""

    value: float
    low: float
    high: float


class PairAgreement(_Frozen):
    """Two raters, on the items that both rated."""

    raters: tuple[str, str]
    agreed: Share
    kappa: Kappa | None
    """None where both gave every item the same category: there chance agrees as well."""


def share(count: int, of: int) -> Share | None:
    """A share with its 95% interval; None of nothing.

    The interval is Wilson's score interval: it stays within [0, 1],
    and says something of shares of 0 and 1 too.
    """
    if of == 0:
        return None
    found = wilson(count, of)
    return Share(count=count, of=of, low=found.low, high=found.high)


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> Kappa | None:
    """Agreement of two raters beyond chance: (p_o - p_e) / (1 - p_e).

    p_o is the share of items with the same category, p_e the share that two raters with these
    frequencies of categories would agree on by chance (Cohen, 1960, Educational and Psychological
    Measurement 20(1)). The interval is Wilson's of p_o with p_e taken as known, as Cohen's own
    standard error takes it.

    Args:
        first: One rater's categories, one an item.
        second: The other's, of the same items in the same order.

    Returns:
        None without items, and where p_e is 1.

    Raises:
        ValueError: the two are not equally long.
    """
    agreed = share(sum(a == b for a, b in zip(first, second, strict=True)), len(first))
    if agreed is None:
        return None
    of_first, of_second = Counter(first), Counter(second)
    expected = sum(of_first[category] * of_second[category] for category in of_first)
    by_chance = expected / agreed.of**2
    if by_chance == 1:
        return None

    def beyond(observed: float) -> float:
        return (observed - by_chance) / (1 - by_chance)

    return Kappa(value=beyond(agreed.value), low=beyond(agreed.low), high=beyond(agreed.high))


def pair_agreement(votes: Votes) -> list[PairAgreement]:
    """Raw agreement and kappa of each two raters that have an item in common."""
    found = []
    for one, other in itertools.combinations(votes, 2):
        shared = [item for item in votes[one] if item in votes[other]]
        first = [votes[one][item] for item in shared]
        second = [votes[other][item] for item in shared]
        agreed = share(sum(a == b for a, b in zip(first, second, strict=True)), len(shared))
        if agreed is not None:
            kappa = cohen_kappa(first, second)
            found.append(PairAgreement(raters=(one, other), agreed=agreed, kappa=kappa))
    return found


def krippendorff_alpha(votes: Votes) -> float | None:
    """Agreement of any number of raters beyond chance, for categories without an order.

    1 - (n - 1) * (disagreements seen) / (disagreements expected), over the pairs of votes within
    each item that two raters or more rated; items that one of them left out are no trouble
    (Krippendorff, 2011, Computing Krippendorff's Alpha-Reliability, section C).

    Returns:
        None where no item has two votes, and where all votes are of one category.
    """
    items = {item for rated in votes.values() for item in rated}
    units = [Counter(rated[item] for rated in votes.values() if item in rated) for item in items]
    units = [unit for unit in units if unit.total() > 1]
    totals = sum(units, Counter())
    n = totals.total()
    # Pairs of unlike votes: all ordered pairs less those of equal ones.
    expected = n**2 - sum(count**2 for count in totals.values())
    if expected == 0:
        return None
    unlike = [unit.total() ** 2 - sum(count**2 for count in unit.values()) for unit in units]
    seen = sum(pairs / (unit.total() - 1) for pairs, unit in zip(unlike, units, strict=True))
    return 1 - (n - 1) * seen / expected


def position_bias(choices: Sequence[str]) -> Share | None:
    """How often `A` was chosen among `A` and `B`.

    Either answer of an item is as likely to stand at A, so a rater who looks at the answers alone
    chooses A about half the time.
    """
    return share(sum(choice == "A" for choice in choices), sum(c in ("A", "B") for c in choices))
