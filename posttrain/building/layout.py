"""The steps laid out so far, and how a stage finds and adds to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from posttrain.errors import Problem
from posttrain.model_reference import ModelReference
from posttrain.pipeline import Input, Output, Rows, Step
from posttrain.recipe import (
    ConvertConfig,
    Recipe,
    StageConfig,
    TrainingConfig,
)
from posttrain.recipe.base import ArtifactKind
from posttrain.store.digests import DigestCache

if TYPE_CHECKING:
    from posttrain.registry import Champion

BASE = "base"
"""What a stage writes as `model` to start from the recipe's own model."""


@dataclass(frozen=True)
class Evaluation:
    """Two evaluations with the same settings."""

    base: Output
    candidate: Output
    model: Input
    """What the candidate's numbers are of."""


@dataclass
class Layout:
    """Steps so far, and what later stages may refer to."""

    recipe: Recipe
    rows: Mapping[str, Rows]
    base: Input
    digests: DigestCache
    steps: list[Step] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    models: dict[str, Output] = field(default_factory=dict)
    """Steps that leave a model or an adapter, by name."""
    prepared: dict[str, Output] = field(default_factory=dict)
    """Prepared datasets by dataset name."""
    rewards: dict[str, Output] = field(default_factory=dict)
    """Steps that leave a reward model, by name."""
    trained_on: dict[str, str] = field(default_factory=dict)
    """Dataset name by model-making step."""
    champions: Mapping[str, Champion] = field(default_factory=dict)
    """Present champions by the names of their registered models."""
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """By the name of the candidate's step."""
    comparisons: dict[str, Input] = field(default_factory=dict)
    """Whose answers a judge compares with another model's, by the judge's step."""
    verdicts: dict[str, list[Evaluation]] = field(default_factory=dict)
    """What a gate decides on, by the gate's step."""

    def __post_init__(self) -> None:
        if isinstance(self.base, ModelReference) and self.base.kind == "gguf":
            self.base = self._add("convert", ConvertConfig(), {"weights": self.base})
        self.current: Input = self.base
        self.last_dataset: str | None = None

    def _add(
        self,
        name: str,
        config: StageConfig,
        inputs: Mapping[str, Input],
        kind: ArtifactKind | None = None,
        suffix: str = "",
    ) -> Output:
        wanted = config.step_name or name
        if suffix:
            wanted = f"{wanted}-{suffix}"
        taken = {step.name for step in self.steps}
        unique, count = wanted, 1
        while unique in taken:
            count += 1
            unique = f"{wanted}-{count}"
        step = Step(unique, config, dict(inputs), kind or config.produces)
        self.steps.append(step)
        return step.output

    def _step(self, output: Output) -> Step:
        return next(step for step in self.steps if step.name == output.step)

    def _step_output(self, name: str) -> Output:
        return next(step.output for step in self.steps if step.name == name)

    def _dataset(self, where: str, name: str) -> Rows | None:
        if name not in self.rows:
            known = ", ".join(self.rows) or "none"
            fix = f"add it under `datasets`; the recipe has: {known}"
            self._problem(where, f"there is no dataset `{name}`", fix)
            return None
        return self.rows[name]

    def _model(self, where: str, name: str | None) -> Input:
        if name is None:
            return self.current
        if name in self.models:
            return self.models[name]
        if name == BASE:
            return self.base
        known = ", ".join([BASE, *self.models])
        self._problem(
            where, f"no stage before this one is `{name}`", f"stages with a model: {known}"
        )
        return self.current

    def _leave_model(self, output: Output, dataset: str) -> None:
        self.current = self.models[output.step] = output
        self.trained_on[output.step] = dataset
        if not self._is_compared(dataset):
            self.last_dataset = dataset

    def _is_compared(self, dataset: str) -> bool:
        """Whether a dataset's rows are pairs or marked answers: no one text to be predicted."""
        return any(
            stage.dataset == dataset and stage.family in ("preferences", "kto")
            for stage in self.recipe.stages
            if isinstance(stage, TrainingConfig)
        )

    def _problem(self, where: str, message: str, fix: str) -> None:
        self.problems.append(Problem(where, message, fix))
