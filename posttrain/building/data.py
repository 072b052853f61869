"""Stages that make datasets, and the checks of their rows."""

from __future__ import annotations

from posttrain.benchmarks import identify_benchmarks
from posttrain.building.layout import Layout
from posttrain.evaluate.python_docs_task import TASKS
from posttrain.pipeline import Input, Output, Step
from posttrain.recipe import (
    ContaminationConfig,
    EvaluateConfig,
    MixConfig,
    OnlineConfig,
    PreflightConfig,
    PrepareConfig,
    TrainingConfig,
)
from posttrain.recipe.mix import MIXED
from posttrain.recipe.prepare import AGAINST, Decontaminate
from posttrain.store.digests import DigestCache


def contamination_step(config: ContaminationConfig, digests: DigestCache) -> Step:
    """The step that indexes the items of benchmarks."""
    benchmarks = identify_benchmarks(
        config.benchmarks, config.task_folders, config.offline_root, digests
    )
    return Step("contamination", config, {"benchmarks": benchmarks}, config.produces)


class DataSteps(Layout):
    """Adds preflight, prepare, mix and contamination."""

    def _add_preflight(self, config: TrainingConfig, dataset: str) -> None:
        """Check the rows of a training stage against the base, once for equal checks."""
        if dataset not in self.rows:
            return
        check = PreflightConfig(
            method=config.stage,
            max_length=_longest_prompt(config) or config.batching.max_length,
            extra_args=tuple(config.extra_args),
            trl_config=config.trl_config,
        )
        inputs = {"model": self.base, "rows": self.rows[dataset]}
        if not any((step.config, step.inputs) == (check, inputs) for step in self.steps):
            self._add("preflight", check, inputs)

    def _add_prepare(self, where: str, config: PrepareConfig) -> None:
        rows = self._dataset(f"{where}.dataset", config.dataset)
        if config.dataset in self.prepared:
            self._problem(where, f"`{config.dataset}` was prepared already", "remove one of them")
        if rows is None:
            return
        inputs: dict[str, Input] = {"rows": rows}
        for operation in ("exact_dedup", "near_dedup"):
            for other in getattr(getattr(config, operation), "against", ()):
                there = f"{where}.{operation}.against"
                if other == config.dataset:
                    self._problem(there, f"`{other}` is the dataset itself", "name another one")
                elif (output := self._prepare(there, other)) is not None:
                    inputs[f"{AGAINST}{other}"] = output
        if config.split.test_dataset is not None:
            test = self._dataset(f"{where}.split.test_dataset", config.split.test_dataset)
            if test is not None:
                inputs["test"] = test
        if config.length is not None and config.length.max_tokens is not None:
            inputs["model"] = self.base
        decontaminate = self._decontaminate(f"{where}.decontaminate", config.decontaminate)
        if decontaminate is not None:
            inputs["contamination"] = self._add_contamination(decontaminate)
            # The index stands for the benchmarks from here on.
            bare = {"benchmarks": None, "task_folders": (), "offline_root": None}
            decontaminate = decontaminate.model_copy(update=bare)
        config = config.model_copy(update={"decontaminate": decontaminate})
        name = config.name or self._prepare_name(config.dataset)
        self.prepared[config.dataset] = self._add(name, config, inputs)

    def _add_contamination(self, decontaminate: Decontaminate) -> Output:
        """Index the evaluation's items, once for equal settings."""
        step = contamination_step(ContaminationConfig.of(decontaminate), self.digests)
        for other in self.steps:
            if (other.config, other.inputs) == (step.config, step.inputs):
                return other.output
        return self._add("contamination", step.config, step.inputs)

    def _add_mix(self, where: str, config: MixConfig) -> None:
        if config.name in self.rows or config.name in self.prepared:
            message = f"there is a dataset `{config.name}` already"
            self._problem(f"{where}.name", message, "give the mix a name of its own")
            return
        prepared = {name: self._prepare(where, name) for name in config.datasets}
        inputs = {MIXED + name: output for name, output in prepared.items() if output is not None}
        self.prepared[config.name] = self._add("mix", config, inputs)

    def _decontaminate(self, where: str, config: Decontaminate | None) -> Decontaminate | None:
        """The settings with the evaluation sets of the recipe filled in; None without any.

        The tasks about Python's documentation ask about the training rows on purpose.
        """
        if config is None:
            return None
        stages = [stage for stage in self.recipe.stages if isinstance(stage, EvaluateConfig)]
        tasks = config.benchmarks
        if tasks is None:
            asked = [task for stage in stages for task in stage.tasks if task not in TASKS]
            tasks = tuple(dict.fromkeys(asked))
        ours = [task for task in tasks if task in TASKS]
        if ours:
            message = f"`{ours[0]}` is made from the rows of the dataset, so it cannot be kept out"
            self._problem(where, message, "leave it out")
        if not tasks:
            return None
        roots = {stage.offline_root for stage in stages} - {None}
        if config.offline_root is None and len(roots) > 1:
            fix = f"write `offline_root` here: one of {', '.join(sorted(map(str, roots)))}"
            self._problem(where, "the `evaluate` stages read benchmarks from several folders", fix)
        folders = [folder for stage in stages for folder in stage.task_folders]
        return config.model_copy(
            update={
                "benchmarks": tasks,
                "task_folders": config.task_folders or tuple(dict.fromkeys(folders)),
                "offline_root": config.offline_root or next(iter(sorted(map(str, roots))), None),
            }
        )

    def _prepare_name(self, dataset: str) -> str:
        return "prepare" if len(self.rows) == 1 else f"prepare-{dataset}"

    def _prepare(self, where: str, dataset: str) -> Output | None:
        """The prepared dataset; with default settings where no stage says otherwise."""
        if dataset not in self.prepared:
            mixes = [stage.name for stage in self.recipe.stages if isinstance(stage, MixConfig)]
            if dataset in mixes and dataset not in self.rows:
                message = f"`{dataset}` is mixed by a later stage"
                self._problem(where, message, "move that stage up")
                return None
            rows = self._dataset(where, dataset)
            if rows is None:
                return None
            for stage in self.recipe.stages:
                if isinstance(stage, PrepareConfig) and stage.dataset == dataset:
                    message = f"`{dataset}` is prepared by a later stage"
                    self._problem(where, message, "move that stage up")
            self._add_prepare(where, PrepareConfig(dataset=dataset))
        return self.prepared[dataset]


def _longest_prompt(config: TrainingConfig) -> int | None:
    """Tokens of the longest prompt that is asked, for a stage that learns from prompts."""
    return config.rollout.max_prompt_tokens if isinstance(config, OnlineConfig) else None
