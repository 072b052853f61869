"""`prepare`: rows in, a clean, split dataset and a ledger of every row out."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.recipe.base import ArtifactKind, StageConfig, Strict


class LengthBounds(Strict):
    """Rows outside these bounds are dropped, with the reason in the ledger."""

    min_characters: Annotated[int, Field(ge=0)] = 1
    """Shortest trainable text (the answers of a chat, the whole of a document), in characters."""
    max_characters: Annotated[int, Field(ge=1)] = 1_000_000
    """Longest whole row, prompt included, in characters."""


class ExactDedup(Strict):
    """Drops rows whose normalised text was seen before; the first one in source order stays."""

    ignore_case: bool = False
    """Treat texts that differ only in upper and lower case as equal."""


class PrepareConfig(StageConfig):
    """Reads a dataset, splits off held-out rows, bounds lengths and removes exact duplicates."""

    produces: ClassVar[ArtifactKind] = "dataset"

    stage: Literal["prepare"] = "prepare"
    dataset: str
    """Name of the dataset, as written under `datasets`."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of rows kept away from training. Chosen by content, so adding rows moves no row."""
    length: LengthBounds = LengthBounds()
    """Bounds on the length of rows."""
    exact_dedup: ExactDedup | None = ExactDedup()
    """Removal of exact duplicates; `null` switches it off."""
