"""`merge`: an adapter becomes part of its base's weights, and the result is proven equal."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.recipe.base import ArtifactKind, StageConfig


class MergeConfig(StageConfig):
    """Folds the adapter into the base in float32 and compares logits before and after."""

    produces: ClassVar[ArtifactKind] = "model"

    stage: Literal["merge"] = "merge"
    model: str | None = None
    """Name of an earlier stage whose adapter is merged. Default: the stage before."""
    check_prompts: Annotated[int, Field(ge=1, le=64)] = 4
    """Held-out rows on which adapter and merged model must agree."""
    max_logit_difference: Annotated[float, Field(gt=0)] = 1e-3
    """Largest absolute difference of a logit that still counts as agreement, in float32."""
