"""`gate`: pass, fail, or not enough evidence, from paired statistics."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from posttrain.recipe.base import ArtifactKind, StageConfig

CANDIDATE = "candidate:"
"""Begins the inputs that are evaluations of several candidates; then comes the stage's name."""

WATCH = "watch:"
"""Begins the inputs that hold what a watch found; then comes the stage that was watched, and with
several candidates before it the candidate's name: `watch:evaluate-ppo:ppo`."""


class GateConfig(StageConfig):
    """Candidate against base, item by item: no worse than `max_drop`, or it does not pass."""

    produces: ClassVar[ArtifactKind] = "verdict"

    stage: Literal["gate"] = "gate"
    candidates: tuple[str, ...] = ()
    """Names of `evaluate` stages whose models are compared with the base and with each other, the
    one to be preferred among equals first. One that passes is enough. Default: the last one before
    the gate."""
    max_drop: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Largest drop in accuracy that is acceptable, as a share (0.02 = two points)."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """One-sided confidence at which a drop beyond `max_drop` must be ruled out to pass."""
    perplexity: Literal["must_improve", "must_not_rise", "ignore"] = "must_not_rise"
    """What held-out perplexity has to do, paired by document."""
    reward_hacking: Literal["fail", "ignore"] = "fail"
    """What a flag of the watch over a candidate's training does to the verdict."""
    bootstrap_samples: Annotated[int, Field(ge=1000)] = 10_000
    """Resamples behind each confidence interval."""
    seed: int = 0
    """Seed of the bootstrap."""

    @field_validator("candidates")
    @classmethod
    def _names_differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a candidate is named twice: remove one of them")
        return value
