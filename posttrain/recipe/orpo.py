"""`orpo`: learning the chosen answers and the preference for them at once."""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.recipe.adapters import PositiveFloat
from posttrain.recipe.base import RowFamily
from posttrain.recipe.preferences import PreferenceConfig


class OrpoConfig(PreferenceConfig):
    """Odds ratio preference optimization (Hong et al., 2024, arXiv:2403.07691): no reference."""

    family: ClassVar[RowFamily] = "preferences"
    peak_learning_rate: ClassVar[float] = 8e-6
    trl_config: ClassVar[str | None] = "experimental.orpo.ORPOConfig"

    stage: Literal["orpo"] = "orpo"
    beta: PositiveFloat = 0.1
    """Weight of the odds ratio beside the likelihood of the chosen answer (the paper's lambda)."""
