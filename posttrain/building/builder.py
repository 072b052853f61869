"""From a recipe to the steps of a pipeline: what a person means, and all that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from posttrain.building.judging import JudgingSteps
from posttrain.building.training import TrainingSteps
from posttrain.errors import RecipeError
from posttrain.model_reference import ModelReference
from posttrain.pipeline import Pipeline, Rows, Step
from posttrain.recipe import (
    EvaluateConfig,
    GateConfig,
    JudgeConfig,
    MergeConfig,
    MixConfig,
    PrepareConfig,
    Recipe,
    RegisterConfig,
    StageConfig,
    TrainingConfig,
)
from posttrain.store import Artifact
from posttrain.store.digests import DigestCache

if TYPE_CHECKING:
    from posttrain.registry import Champion


def build_pipeline(
    recipe: Recipe,
    model: ModelReference | Artifact,
    rows: Mapping[str, Rows],
    digests: DigestCache,
    file: str | None = None,
    champions: Mapping[str, Champion] | None = None,
) -> Pipeline:
    """Lay out the steps of a recipe.

    Args:
        recipe: a validated recipe.
        model: its base model, resolved.
        rows: its datasets, with digests, by name.
        digests: remembers digests of the files that benchmarks are read from.
        file: the recipe's file, for messages.
        champions: the models that candidates have to stand beside, by their registered names.

    Raises:
        RecipeError: stages that cannot follow each other, each with what to write instead.
    """
    builder = _Builder(recipe, rows, model, digests, champions=champions or {})
    builder.add_checks()
    for position, config in enumerate(recipe.stages):
        builder.add_stage(position, config)
    if builder.problems:
        raise RecipeError(builder.problems, file)
    return Pipeline(recipe, _cheap_mistakes_first(builder.steps))


def _cheap_mistakes_first(steps: list[Step]) -> tuple[Step, ...]:
    """Everything that needs no training goes before the training, in an order that can run.

    A bad row, a misspelt benchmark or one that cannot be reached is then found in minutes, by
    `prepare` and by the evaluation of the base, and not after a night of training.
    """
    early: set[str] = set()
    for step in steps:
        if not isinstance(step.config, TrainingConfig) and step.waits_for() <= early:
            early.add(step.name)
    first = [step for step in steps if step.name in early]
    return (*first, *(step for step in steps if step.name not in early))


class _Builder(TrainingSteps, JudgingSteps):
    """Adds the stages of a recipe one by one."""

    def add_checks(self) -> None:
        """Check the rows of every training stage first."""
        for config in self.recipe.stages:
            if isinstance(config, TrainingConfig):
                for name in self.recipe.made_of(config.dataset):
                    self._add_preflight(config, name)

    def add_stage(self, position: int, config: StageConfig) -> None:
        where = f"stages[{position}].{config.stage}"
        match config:
            case PrepareConfig():
                self._add_prepare(where, config)
            case MixConfig():
                self._add_mix(where, config)
            case TrainingConfig():
                self._add_training(where, config)
            case MergeConfig():
                self._add_merge(where, config)
            case EvaluateConfig():
                self._add_evaluate(where, config)
            case JudgeConfig():
                self._add_judge(where, config)
            case GateConfig():
                self._add_gate(where, config)
            case RegisterConfig():
                self._add_register(where, config)
