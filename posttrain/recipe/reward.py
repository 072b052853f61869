"""`reward`: a model that scores answers, learned from pairs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.recipe.base import ArtifactKind, RowFamily
from posttrain.recipe.training import TrainingConfig


class RewardConfig(TrainingConfig):
    """Learns to score the chosen answer of a pair above the rejected one (Bradley-Terry).

    Leaves a reward model; the model that the next stage starts from stays the one before it.
    """

    produces: ClassVar[ArtifactKind] = "reward"
    family: ClassVar[RowFamily] = "preferences"
    peak_learning_rate: ClassVar[float] = 1e-5
    trl_config: ClassVar[str | None] = "RewardConfig"

    stage: Literal["reward"] = "reward"
    center: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the squared sum of a pair's two scores, which keeps scores around zero (Eisenstein
    et al., 2023, arXiv:2312.09244, appendix B). 0 leaves them where they fall."""
    use_margins: bool = True
    """Ask for at least the `margin` of a pair between its scores, where rows have one (Touvron et
    al., 2023, arXiv:2307.09288, equation 2)."""
