"""`grpo`: policy gradients with the mean of several answers in place of a critic."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from posttrain.recipe.adapters import PositiveInt
from posttrain.recipe.online import OnlineConfig

_OURS = {
    **dict.fromkeys(
        ("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"),
        "log-probabilities are those of all tokens, so nothing is cut off when answers are drawn",
    ),
    **dict.fromkeys(
        ("cache_implementation", "use_transformers_continuous_batching", "use_transformers_paged"),
        "`rollout` says how answers are written",
    ),
    **dict.fromkeys(
        ("generation_batch_size", "steps_per_generation"),
        "every optimizer step learns from `batching.batch_size` answers, `passes` times",
    ),
    **dict.fromkeys(
        ("entropy_coef", "use_adaptive_entropy"), "the entropy is measured, and has no gradient"
    ),
    "chat_template_kwargs": "prompts are tokenized before TRL sees them",
    "disable_dropout": "the model that writes is the one that is trained",
    "log_completions": "answers are in answers.parquet",
    "num_generations_eval": "the held-out prompts have one answer each",
    "ref_model_mixup_alpha": "the reference is the model before this stage",
    "ref_model_sync_steps": "the reference is the model before this stage",
    "shuffle_dataset": "prompts are shuffled every pass already",
    "sync_ref_model": "the reference is the model before this stage",
}
"""Field of TRL's config -> why posttrain sets it and a recipe cannot."""


class GroupConfig(OnlineConfig):
    """Several answers a prompt, each judged by the others.

    `epochs` counts how often each prompt is asked.
    """

    answers: Annotated[int, Field(ge=2)] = 8
    """Answers written to each prompt. `batching.batch_size` counts answers and must be a multiple.
    """
    beta: Annotated[float, Field(ge=0)] = 0.04
    """Price of moving away from the model as it was, by KL divergence. With 0 and all weights the
    reference is loaded for evaluations only."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The probability ratio counts within 1 plus or minus this."""
    passes: PositiveInt = 1
    """Optimizer steps on the same answers. A checkpoint holds no answers: `max_steps` and
    `validation.every_steps` must be multiples."""

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.batching.batch_size % self.answers:
            raise ValueError(
                f"a batch of {self.batching.batch_size} answers holds no whole groups of "
                f"{self.answers}: batching.batch_size must be a multiple of `answers`"
            )
        return self

    @model_validator(mode="after")
    def _whole_passes(self) -> Self:
        for key, steps in (
            ("max_steps", self.max_steps),
            ("validation.every_steps", self.validation.every_steps),
        ):
            if steps is not None and steps % self.passes:
                raise ValueError(
                    f"`{key}` is {steps}, and {self.passes} steps learn from the same answers: "
                    f"{key} must be a multiple of `passes`"
                )
        return self

    @model_validator(mode="after")
    def _whole_models_write(self) -> Self:
        sharding = self.launch.sharding
        if sharding is not None and (sharding.fsdp or sharding.zero == 3):
            raise ValueError(
                f"`{self.stage}` writes answers with a whole model, which `zero: 3` and `fsdp` "
                "divide: write `sharding: {zero: 2}`"
            )
        return self

    @model_validator(mode="after")
    def _not_set_by_hand(self) -> Self:
        for name in self.extra_args:
            if name in _OURS:
                raise ValueError(f"`extra_args.{name}`: posttrain sets this itself: {_OURS[name]}")
        return self


class GrpoConfig(GroupConfig):
    """Group relative policy optimization (Shao et al., 2024, arXiv:2402.03300)."""

    trl_config: ClassVar[str | None] = "GRPOConfig"

    stage: Literal["grpo"] = "grpo"
    loss: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = "dapo"
    """How tokens are weighted, by TRL's names; all but `grpo` without a bias towards length."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation the advantages are divided by."""
