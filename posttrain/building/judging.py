"""Stages that measure models and decide on them."""

from __future__ import annotations

from posttrain.ancestry import Ancestry
from posttrain.benchmarks import identify_benchmarks
from posttrain.building.data import DataSteps
from posttrain.building.layout import Evaluation
from posttrain.hardware import resolve_dtype
from posttrain.pipeline import Input, Output
from posttrain.recipe import (
    EvaluateConfig,
    GateConfig,
    OnlineConfig,
)
from posttrain.recipe.gate import CANDIDATE, WATCH


class JudgingSteps(DataSteps):
    """Adds evaluate and gate."""

    def _add_evaluate(self, where: str, config: EvaluateConfig) -> None:
        candidate = self._model(f"{where}.model", config.model)
        name = config.dataset or self.last_dataset
        if not config.tasks and name is None:
            fix = "name `tasks`, or a `dataset` for perplexity"
            self._problem(where, "has nothing to measure", fix)
            return
        config = config.model_copy(update={"dtype": resolve_dtype(config.dtype)})
        inputs: dict[str, Input] = {}
        if config.tasks:
            inputs["benchmarks"] = identify_benchmarks(
                config.tasks, config.task_folders, config.offline_root, self.digests
            )
        if name is not None:
            dataset = self._prepare(f"{where}.dataset", name)
            if dataset is None:
                return
            inputs["dataset"] = dataset
        if candidate == self.base:
            base = self._add("evaluate", config, {"model": self.base, **inputs})
            self.evaluations[base.step] = Evaluation(base, base, candidate)
            return
        of_base = config.model_copy(update={"model": None})
        base = self._evaluate_base(of_base, {"model": self.base, **inputs})
        output = self._add("evaluate", config, {"model": candidate, **inputs})
        self.evaluations[output.step] = Evaluation(base, output, candidate)

    def _evaluate_base(self, config: EvaluateConfig, inputs: dict[str, Input]) -> Output:
        """The base's numbers, measured once for all candidates that are measured alike."""
        for other in self.steps:
            same = other.config.model_copy(update={"name": config.name}) == config
            if same and other.inputs == inputs:
                return other.output
        return self._add("evaluate", config, inputs, suffix="base")

    def _add_gate(self, where: str, config: GateConfig) -> None:
        if not self.evaluations:
            fix = "put `- evaluate: {tasks: [...]}` before it"
            self._problem(where, "has no numbers to decide on", fix)
            return
        unknown = [name for name in config.candidates if name not in self.evaluations]
        for name in unknown:
            fix = f"evaluations before it: {', '.join(self.evaluations)}"
            self._problem(f"{where}.candidates", f"no evaluation before it is `{name}`", fix)
        if unknown:
            return
        judged = [self.evaluations[name] for name in config.candidates or [*self.evaluations][-1:]]
        if any(one.base == one.candidate for one in judged):
            fix = "put the gate after a stage that trains"
            self._problem(where, "would compare the base model with itself", fix)
        elif len({one.base for one in judged}) > 1:
            fix = "give their `evaluate` stages the same settings"
            self._problem(f"{where}.candidates", "are not measured alike", fix)
        else:
            self._add("gate", config, self._gate_inputs(config, judged))

    def _gate_inputs(self, config: GateConfig, judged: list[Evaluation]) -> dict[str, Input]:
        """The evaluations, and what watched over the candidates while they were trained."""
        inputs: dict[str, Input] = {"base": judged[0].base}
        for one in judged:
            several = bool(config.candidates)
            name = f"{CANDIDATE}{one.candidate.step}" if several else "candidate"
            watch = f"{WATCH}{one.candidate.step}:" if several else WATCH
            inputs[name] = one.candidate
            for step in Ancestry(self.steps).trained_by(one.model):
                if isinstance(step.config, OnlineConfig):
                    inputs[f"{watch}{step.name}"] = step.output
        return inputs
