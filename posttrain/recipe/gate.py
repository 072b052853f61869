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


COMPARISON = "comparison"
"""Name of the input with the judge's comparison; with several candidates `comparison:NAME`."""

TRAINED = "trained:"
"""Begins the inputs that are the models or adapters a candidate comes from, for the report's
curves; then comes the training stage's name."""


class GateConfig(StageConfig):
    """Candidate against base and champion, item by item: no worse than `max_drop`, or no pass."""

    produces: ClassVar[ArtifactKind] = "verdict"
    accounts: ClassVar[frozenset[str]] = frozenset({"report.html", "verdict.md"})
    code_version: ClassVar[int] = 2

    stage: Literal["gate"] = "gate"
    candidates: tuple[str, ...] = ()
    """Names of `evaluate` stages whose models are compared with the base and with each other, the
    one to be preferred among equals first. One that passes is enough. Default: the last one before
    the gate."""
    against: str = "base"
    """What the candidates are compared with: `base`, or the name of an earlier `evaluate` stage,
    so that a regression is found at the stage that caused it."""
    champion: str | None = None
    """Name of a registered model whose champion the candidates are compared with as well. Default:
    that of the recipe's `register` stage; without a champion there is nothing to compare with."""
    against_champion: Literal["must_not_drop", "must_improve", "ignore"] = "must_not_drop"
    """What the candidates must be, beside the champion: no worse than `max_drop` on every task, or
    also better, shown on the mean of all tasks."""
    max_drop: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Largest drop in accuracy that is acceptable, as a share (0.02 = two points)."""
    max_drops: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    """Other bounds than `max_drop`, by task."""
    must_improve: tuple[str, ...] = ()
    """Tasks, or metrics of test sets such as `tests:exact_match`, that must be better than before,
    shown at `confidence`."""
    min_win_rate: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    """Where a `judge` stage compared the candidate's answers: share of prompts won, ties counting
    half, that must be exceeded at `confidence`. `null` leaves it out."""
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
