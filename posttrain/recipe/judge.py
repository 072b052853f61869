"""`judge`: answers of two models to the same prompts, compared without knowing whose they are."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.recipe.base import ArtifactKind, StageConfig

OPPONENT = "opponent"
"""Name of the input with the model that the candidate is compared with."""
RATINGS = "ratings:"
"""Begins the inputs that are sheets filled in by people; then comes the file's position."""


class JudgeConfig(StageConfig):
    """Which of two models' answers are preferred, blind, by people or by a model."""

    produces: ClassVar[ArtifactKind] = "comparison"

    stage: Literal["judge"] = "judge"
    model: str | None = None
    """Name of an earlier stage whose answers are compared. Default: the stage before."""
    against: str = "base"
    """Name of an earlier stage, or `base`: whose answers they are compared with."""
    dataset: str | None = None
    """Dataset whose held-out prompts are answered. Default: the one last trained on."""
    prompts: Annotated[int, Field(ge=1)] = 60
    """Prompts answered; under 50 the interval is too wide for most decisions."""
    seed: int = 0
    """Decides which prompts are drawn, and whose answer stands first."""
