"""`grpo`: policy gradients with the mean of several answers in place of a critic."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from posttrain.recipe.adapters import PositiveInt
from posttrain.recipe.online import OnlineConfig


class GroupConfig(OnlineConfig):
    """Several answers a prompt, each judged by the others."""

    answers: Annotated[int, Field(ge=2)] = 8
    """Answers written to each prompt. `batching.batch_size` counts answers and must be a multiple.
    """
    beta: Annotated[float, Field(ge=0)] = 0.04
    """Price of moving away from the model as it was, by KL divergence. 0 needs no reference."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The probability ratio counts within 1 plus or minus this."""
    passes: PositiveInt = 1
    """Optimizer steps on the same answers."""

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.batching.batch_size % self.answers:
            raise ValueError(
                f"a batch of {self.batching.batch_size} answers holds no whole groups of "
                f"{self.answers}: batching.batch_size must be a multiple of `answers`"
            )
        return self


class GrpoConfig(GroupConfig):
    """Group relative policy optimization (Shao et al., 2024, arXiv:2402.03300)."""

    trl_config: ClassVar[str | None] = "GRPOConfig"

    stage: Literal["grpo"] = "grpo"
    loss: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = "dapo"
    """How tokens are weighted, by TRL's names; all but `grpo` without a bias towards length."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation the advantages are divided by."""
