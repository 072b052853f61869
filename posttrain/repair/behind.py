"""Which stages of a recipe a gate decides on, by their positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from posttrain.recipe import MergeConfig, Recipe, RewardConfig, StageConfig, TrainingConfig
from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.recipe.gate import GateConfig
from posttrain.recipe.judge import JudgeConfig

BASE = "base"


@dataclass(frozen=True)
class Behind:
    """A gate, what it decides on, and what made that."""

    recipe: Recipe
    gate: int
    evaluations: tuple[int, ...]
    """The `evaluate` stages of its candidates, the first one's first."""
    models: tuple[int, ...]
    """Stages behind the first candidate that leave a model, the last one first."""

    @property
    def config(self) -> GateConfig:
        """The gate's settings."""
        found = self.recipe.stages[self.gate]
        if not isinstance(found, GateConfig):
            raise TypeError(f"stage {self.gate} is no gate")
        return found

    @property
    def trained(self) -> tuple[int, ...]:
        """Those of `models` that train, the last one first."""
        stages = self.recipe.stages
        return tuple(index for index in self.models if isinstance(stages[index], TrainingConfig))

    @property
    def measured_on_training(self) -> bool:
        """Whether the first candidate's perplexity is on what the last training stage learned."""
        evaluate = self.recipe.stages[self.evaluations[0]]
        named = evaluate.dataset if isinstance(evaluate, EvaluateConfig) else None
        stages = [self.recipe.stages[n] for n in self.trained]
        learned = {one.dataset for one in stages if isinstance(one, TrainingConfig)}
        parts = {part for name in learned for part in self.recipe.made_of(name)}
        return named is None or named in learned | parts

    @property
    def judges(self) -> tuple[int, ...]:
        """The `judge` stages before the gate."""
        stages = enumerate(self.recipe.stages[: self.gate])
        return tuple(index for index, one in stages if isinstance(one, JudgeConfig))


def behind_gate(recipe: Recipe, gate: str | None = None) -> Behind | None:
    """Of the gate of this name, or of the last one; None where there is none to be found."""
    names = stage_names(recipe)
    gates = [n for n, stage in enumerate(recipe.stages) if isinstance(stage, GateConfig)]
    if gate is not None:
        gates = [n for n in gates if names[n] == gate] or gates
    if not gates:
        return None
    config = recipe.stages[gates[-1]]
    earlier = {
        names[n]: n
        for n, stage in enumerate(recipe.stages[: gates[-1]])
        if isinstance(stage, EvaluateConfig)
    }
    wanted = config.candidates if isinstance(config, GateConfig) else ()
    evaluations = [earlier[name] for name in wanted if name in earlier] or [*earlier.values()][-1:]
    if not evaluations:
        return None
    first = model_of(recipe, evaluations[0])
    models = tuple(_back_from(recipe, first)) if first is not None else ()
    return Behind(recipe, gates[-1], tuple(evaluations), models)


def stage_names(recipe: Recipe) -> list[str]:
    """What stages refer to each other by: `name`, or the kind, numbered from the second on."""
    names: list[str] = []
    for stage in recipe.stages:
        wanted = stage.step_name or stage.stage
        unique, count = wanted, 1
        while unique in names:
            count += 1
            unique = f"{wanted}-{count}"
        names.append(unique)
    return names


def model_of(recipe: Recipe, position: int) -> int | None:
    """The stage whose model a stage takes; None for the recipe's base model."""
    named = getattr(recipe.stages[position], "model", None)
    if named == BASE:
        return None
    names = stage_names(recipe)[:position]
    if named is not None:
        return names.index(named) if named in names else None
    before = [n for n in range(position) if leaves_model(recipe.stages[n])]
    return before[-1] if before else None


def leaves_model(stage: StageConfig) -> bool:
    """Whether the next stage may start from what this one leaves."""
    return isinstance(stage, MergeConfig) or (
        isinstance(stage, TrainingConfig) and not isinstance(stage, RewardConfig)
    )


def _back_from(recipe: Recipe, position: int) -> Iterator[int]:
    names, seen, waiting = stage_names(recipe), set[int](), [position]
    while waiting:
        current = waiting.pop(0)
        if current in seen:
            continue
        seen.add(current)
        yield current
        stage = recipe.stages[current]
        if isinstance(stage, MergeConfig) and stage.models:
            waiting += [names.index(one.model) for one in stage.models if one.model in names]
        elif (before := model_of(recipe, current)) is not None:
            waiting.append(before)
