"""`preflight`: what can be known about a training stage before the first long step."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.recipe.base import ArtifactKind, StageConfig


class PreflightConfig(StageConfig):
    """Tokenizes a sample of the rows as training will and refuses what would train nothing."""

    produces: ClassVar[ArtifactKind] = "report"

    stage: Literal["preflight"] = "preflight"
    method: str
    """The training stage's kind."""
    max_length: Annotated[int, Field(ge=8)]
    """The training stage's longest sequence, in tokens."""
    extra_args: tuple[str, ...] = ()
    """Names under the training stage's `extra_args`."""
    trl_config: str | None = "SFTConfig"
    """TRL's class that these are fields of."""
    sample_rows: Annotated[int, Field(ge=1)] = 64
    """Rows read from the start of the dataset."""
