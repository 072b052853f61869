"""What a mix consists of, for people and for `report.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from posttrain.data.mix_shares import Member, Role
from posttrain.data.operations.base import Side
from posttrain.recipe.base import RowFamily
from posttrain.recipe.mix import MixConfig

if TYPE_CHECKING:
    from posttrain.data.mix_parts import Part


class MixedSide(BaseModel):
    """One side of one dataset in a mix. `rows_in` = `rows_taken` + all in `left_out`."""

    model_config = ConfigDict(frozen=True)

    rows_in: int
    rows_taken: int
    """Different rows that are in the mix."""
    rows_out: int
    """The same, each counted as often as it occurs."""
    left_out: dict[str, int] = {}
    """Rows that are not in the mix, by reason."""


class MixedDataset(BaseModel):
    """One dataset in a mix."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    role: Role
    share: float
    """Of the training rows, as wanted; `sides` says what it became."""
    prefix: str | None
    sides: dict[Side, MixedSide]


class MixReport(BaseModel):
    """What `report.json` of a mix holds."""

    model_config = ConfigDict(frozen=True)

    family: RowFamily
    rows: dict[Side, int]
    """Rows of the mix."""
    wanted: int
    """Training rows that were asked for, or that the sources alone would allow."""
    temperature: float | None
    max_repeats: int
    seed: int
    datasets: tuple[MixedDataset, ...]
    warnings: tuple[str, ...]


def report_of(
    config: MixConfig,
    family: RowFamily,
    members: Sequence[Member],
    parts: Mapping[Side, Sequence[Part]],
    wanted: int,
    warnings: Sequence[str],
) -> MixReport:
    """The report of a mix that was written."""
    names = [member.dataset for member in members]
    datasets = [
        MixedDataset(
            dataset=member.dataset,
            role=member.role,
            share=float(member.share),
            prefix=member.prefix,
            sides={side: _side(own[number], names) for side, own in parts.items()},
        )
        for number, member in enumerate(members)
    ]
    return MixReport(
        family=family,
        rows={side: sum(part.taken for part in own) for side, own in parts.items()},
        wanted=wanted,
        temperature=config.temperature,
        max_repeats=config.max_repeats,
        seed=config.seed,
        datasets=tuple(datasets),
        warnings=tuple(warnings),
    )


def headline(report: MixReport) -> str:
    """`9,800 train + 98 validation: chats 7,350 (75%), replay general 980 (10%)`."""
    sides = " + ".join(f"{count:,} {side}" for side, count in report.rows.items() if count)
    listed = []
    for dataset in report.datasets:
        count = dataset.sides["train"].rows_out
        role = "" if dataset.role == "source" else f"{dataset.role} "
        share = count / report.rows["train"]
        listed.append(f"{role}{dataset.dataset} {count:,} ({100 * share:.3g}%)")
    return f"{sides}: {', '.join(listed)}"


def _side(part: Part, names: Sequence[str]) -> MixedSide:
    taken = int((part.copies > 0).sum())
    left = part.held_in[part.copies == 0]
    reasons: Counter[str] = Counter(
        f"held out in {names[number]}" if number >= 0 else "not sampled" for number in left.tolist()
    )
    if taken + reasons.total() != len(part) or np.any(part.copies[part.held_in >= 0]):
        raise RuntimeError(f"the mix lost or invented rows: {len(part)} in, {taken} taken")
    return MixedSide(
        rows_in=len(part),
        rows_taken=taken,
        rows_out=part.taken,
        left_out=dict(sorted(reasons.items())),
    )
