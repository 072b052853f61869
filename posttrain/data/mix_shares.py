"""The arithmetic of a mix: which share each dataset has, and how many rows that makes.

Shares are exact fractions, so that no rounding of floats moves a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from posttrain.recipe.mix import MixConfig, MixShare

Role = Literal["source", "replay", "adversarial"]


@dataclass(frozen=True)
class Member:
    """One dataset of a mix."""

    dataset: str
    role: Role
    share: Fraction
    """Of the mix's training rows."""
    prefix: str | None

    def __str__(self) -> str:
        return f"`{self.dataset}`" if self.role == "source" else f"{self.role} `{self.dataset}`"


def members_of(config: MixConfig, rows: Sequence[int]) -> list[Member]:
    """The datasets with their shares, which sum to 1.

    Without weights a source's share is proportional to rows ** (1 / temperature) (Raffel et al.
    2020, arXiv:1910.10683, section 3.5.2); without a temperature, to its rows.

    Args:
        config: The recipe's mix.
        rows: Training rows that each dataset has, in the order of `config.datasets`; none is 0.
    """
    weights = [
        _exact(source.weight)
        if source.weight is not None
        else _flattened(count, config.temperature)
        for source, count in zip(config.sources, rows, strict=False)
    ]
    fixed: list[tuple[Role, MixShare]] = []
    if config.replay is not None:
        fixed.append(("replay", config.replay))
    if config.adversarial is not None:
        fixed.append(("adversarial", config.adversarial))
    left = 1 - sum((_exact(share.fraction) for _, share in fixed), Fraction())
    total = sum(weights, Fraction())
    return [
        *(
            Member(source.dataset, "source", left * weight / total, source.prefix)
            for source, weight in zip(config.sources, weights, strict=True)
        ),
        *(
            Member(share.dataset, role, _exact(share.fraction), share.prefix)
            for role, share in fixed
        ),
    ]


@dataclass(frozen=True)
class TrainingSizes:
    """How many training rows each member gives, repeats counted."""

    taken: list[int]
    wanted: int
    """Total that was asked for."""
    warnings: list[str]
    """What could not be had, with the numbers."""


def training_sizes(
    members: Sequence[Member], rows: Sequence[int], wanted: int | None, max_repeats: int
) -> TrainingSizes:
    """Divide the training rows by the shares; where rows are short, the total shrinks.

    Args:
        members: The datasets.
        rows: Training rows that each has; none is 0.
        wanted: Training rows in total; None for as many as there are.
        max_repeats: How often a row may occur.
    """
    own = [(member, count) for member, count in zip(members, rows, strict=True)]
    # The total at which a member has given all it may.
    ends = [count * max_repeats / member.share for member, count in own]
    if wanted is None:
        sources = [
            (count / member.share, end)
            for (member, count), end in zip(own, ends, strict=True)
            if member.role == "source"
        ]
        once = max(used_up for used_up, _ in sources)
        wanted = math.floor(min(once, *(end for _, end in sources)))
    total = min(wanted, math.floor(min(ends)))
    limits = [count * max_repeats for count in rows]
    taken = apportion(total, [member.share for member in members], limits)
    short = [pair for pair, end in zip(own, ends, strict=True) if end < wanted]
    warnings = [_shortage(short, wanted, total, max_repeats)] if total < wanted else []
    for member, count in zip(members, taken, strict=True):
        if count == 0:
            warnings.append(
                f"{member} has no row in the mix: {_percent(member.share)} of {total:,} rows is "
                "less than one; mix more rows, or give it a larger share"
            )
    return TrainingSizes(taken, wanted, warnings)


def held_out_sizes(
    members: Sequence[Member], rows: Sequence[int], taken: Sequence[int], of: Sequence[int]
) -> list[int]:
    """Validation or test rows of each member, none twice.

    They are taken at the rate at which the training rows are, the highest rate of a source being
    all of its rows. So sources that were split alike have the same shares on every side, and if
    nothing is left out of training, nothing is here. Replay and adversarial rows never get more
    than their share, however many a general dataset holds out.

    Args:
        members: The datasets.
        rows: Rows of this side that each has.
        taken: Training rows that each gives, repeats counted.
        of: Training rows that each has; none is 0.
    """
    rates = [Fraction(*pair) for pair in zip(taken, of, strict=True)]
    highest = max(r for m, r in zip(members, rates, strict=True) if m.role == "source")
    if not highest:
        return [0] * len(members)
    sizes = [
        min(count, _at_least_one(count * rate / highest)) if rate else 0
        for count, rate in zip(rows, rates, strict=True)
    ]
    sources = [i for i, member in enumerate(members) if member.role == "source"]
    whole = sum(sizes[i] for i in sources) / sum((members[i].share for i in sources), Fraction())
    for i, member in enumerate(members):
        if member.role != "source":
            sizes[i] = min(sizes[i], _at_least_one(whole * member.share) if whole else 0)
    return sizes


def apportion(
    total: int, shares: Sequence[Fraction], limits: Sequence[int] | None = None
) -> list[int]:
    """Whole numbers near `total * share` that sum to `total`.

    By Webster's method (Balinski and Young 1982, "Fair Representation"): a larger total takes
    nothing away from anyone, which largest remainders do not promise. So samples are nested.

    Args:
        total: What is divided.
        shares: Of each; they sum to 1.
        limits: The most that each can have; together at least `total`.
    """
    # Nobody ends up further than half of one more than their number below the exact share.
    sizes = [max(0, math.floor(total * share) - len(shares)) for share in shares]
    while sum(sizes) < total:
        open_ = [i for i in range(len(shares)) if limits is None or sizes[i] < limits[i]]
        sizes[max(open_, key=lambda i: (shares[i] / (2 * sizes[i] + 1), -i))] += 1
    return sizes


def _shortage(
    short: Sequence[tuple[Member, int]], wanted: int, total: int, max_repeats: int
) -> str:
    listed = "; ".join(
        f"{member} wants {_percent(member.share)} = {math.ceil(wanted * member.share):,} rows but "
        f"has {count:,}"
        for member, count in short
    )
    repeats = max(math.ceil(wanted * member.share / count) for member, count in short)
    return (
        f"{listed} (max_repeats: {max_repeats}). Shares stay, so the mix has {total:,} training "
        f"rows instead of {wanted:,}: raise `max_repeats` to {repeats}, or lower the share"
    )


def _percent(share: Fraction) -> str:
    return f"{float(100 * share):.3g}%"


def _exact(number: float) -> Fraction:
    """The decimal number that was written, not its binary neighbour: 0.1 is a tenth."""
    return Fraction(repr(number))


def _flattened(count: int, temperature: float | None) -> Fraction:
    if temperature is None or temperature == 1:
        return Fraction(count)
    return Fraction(count ** (1 / temperature))


def _at_least_one(number: Fraction) -> int:
    return max(1, math.floor(number + Fraction(1, 2)))
