"""`rloo`: REINFORCE with the other answers to the same prompt as the baseline."""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.recipe.grpo import GroupConfig


class RlooConfig(GroupConfig):
    """REINFORCE leave-one-out (Ahmadian et al., 2024, arXiv:2402.14740)."""

    trl_config: ClassVar[str | None] = "RLOOConfig"

    stage: Literal["rloo"] = "rloo"
    normalize_advantages: bool = False
    """Give the advantages of a batch mean 0 and standard deviation 1."""
