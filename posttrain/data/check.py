"""Opening a dataset before anything runs, so that a mistake costs seconds."""

from __future__ import annotations

import itertools

from posttrain.data.formats import FAMILIES, read_rows
from posttrain.data.records import BadRecord
from posttrain.data.rows import family_of
from posttrain.data.sources import BUILTIN, HUB
from posttrain.errors import DataError, Problem
from posttrain.recipe.base import RowFamily
from posttrain.recipe.datasets import DatasetSpec


def check_dataset(
    name: str, spec: DatasetSpec, wanted: RowFamily | None, rows: int = 20
) -> tuple[RowFamily | None, list[Problem]]:
    """Read the first rows of a dataset and say what is wrong with it.

    A Hub dataset is not opened: that takes the network and minutes. Its family is known only if
    its `format` is stated. A built-in source is not generated: its family is known.

    Args:
        name: The dataset's key in the recipe.
        spec: The dataset.
        wanted: The family that the stage using it needs; None takes any.
        rows: Records to look at.

    Returns:
        The family of its rows, None where it is not known, and the problems found.
    """
    where = f"datasets.{name}"
    stated = FAMILIES[spec.format] if spec.format != "auto" else None
    if _is_hub(spec):
        return stated, _wrong_family(where, stated, wanted)
    built_in = _built_in_family(spec)
    if built_in is not None:
        return built_in, _wrong_family(where, built_in, wanted)
    limit = min(rows, spec.limit or rows)
    good: list[RowFamily] = []
    bad: list[BadRecord] = []
    # Skipped here and reported below, so that one look finds every bad row.
    look = spec.model_copy(update={"limit": limit, "on_bad_row": "skip"})
    try:
        for row in read_rows(look):
            if isinstance(row, BadRecord):
                bad.append(row)
            else:
                good.append(family_of(row))
    except DataError as error:
        return stated, [Problem(f"{where}.source", str(error))]
    family = good[0] if good else stated
    problems = [] if spec.on_bad_row == "skip" else _bad_rows(where, bad)
    if not good and not bad:
        problems.append(Problem(f"{where}.source", f"{_shown(spec)}: holds no rows"))
    elif not good and spec.on_bad_row == "skip":
        message = f"none of the first {len(bad)} rows can be used: {bad[0]}"
        problems.append(Problem(f"{where}.source", message))
    return family, problems + _wrong_family(where, family, wanted)


def _bad_rows(where: str, bad: list[BadRecord]) -> list[Problem]:
    """One problem for all bad rows; the first three are enough to see the pattern."""
    if not bad:
        return []
    shown = "; ".join(str(record) for record in itertools.islice(bad, 3))
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    fix = f"correct the rows, or write `{where}.on_bad_row: skip` to leave such rows out"
    return [Problem(f"{where}.source", shown + more, fix)]


def _wrong_family(where: str, family: RowFamily | None, wanted: RowFamily | None) -> list[Problem]:
    if wanted is None or family is None or family == wanted:
        return []
    formats = ", ".join(name for name, of in FAMILIES.items() if of == wanted)
    return [
        Problem(
            f"{where}.format",
            f"its rows are {family}, but the stage that uses it needs {wanted}",
            f"use a dataset in one of these formats: {formats}",
        )
    ]


def _built_in_family(spec: DatasetSpec) -> RowFamily | None:
    """Family of one built-in source read as it is; None for anything else."""
    if not isinstance(spec.source, str) or spec.format != "auto" or spec.columns:
        return None
    families: dict[str, RowFamily] = {
        f"{BUILTIN}python-docs/documents": "documents",
        f"{BUILTIN}python-docs/chats": "chats",
        f"{BUILTIN}python-docs/preferences": "preferences",
    }
    return families.get(spec.source)


def _is_hub(spec: DatasetSpec) -> bool:
    sources = (spec.source,) if isinstance(spec.source, str) else spec.source
    return any(source.startswith(HUB) for source in sources)


def _shown(spec: DatasetSpec) -> str:
    return spec.source if isinstance(spec.source, str) else ", ".join(spec.source)
