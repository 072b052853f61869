"""From a recipe to the steps of a pipeline: what a person means, and all that follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.ancestry import Ancestry
from posttrain.benchmarks import identify_benchmarks
from posttrain.errors import Problem, RecipeError
from posttrain.evaluate.python_docs_task import TASKS
from posttrain.hardware import resolve_dtype
from posttrain.merge_inputs import folding_problems, merge_inputs, merge_problems
from posttrain.model_reference import ModelReference
from posttrain.pipeline import Code, Input, Output, Pipeline, Rows, Step
from posttrain.recipe import (
    ContaminationConfig,
    ConvertConfig,
    DpoConfig,
    EvaluateConfig,
    GateConfig,
    KtoConfig,
    MergeConfig,
    MixConfig,
    OnlineConfig,
    PreflightConfig,
    PrepareConfig,
    PretrainConfig,
    Recipe,
    ReferenceConfig,
    RewardConfig,
    RewardTerm,
    StageConfig,
    TrainingConfig,
)
from posttrain.recipe.base import ArtifactKind
from posttrain.recipe.mix import MIXED, MixShare, MixSource
from posttrain.recipe.online import REWARD
from posttrain.recipe.prepare import AGAINST, Decontaminate
from posttrain.recipe.pretrain import Replay
from posttrain.store import Artifact
from posttrain.store.digests import DigestCache

BASE = "base"
"""What a stage writes as `model` to start from the recipe's own model."""


def build_pipeline(
    recipe: Recipe,
    model: ModelReference | Artifact,
    rows: Mapping[str, Rows],
    digests: DigestCache,
    file: str | None = None,
) -> Pipeline:
    """Lay out the steps of a recipe.

    Args:
        recipe: a validated recipe.
        model: its base model, resolved.
        rows: its datasets, with digests, by name.
        digests: remembers digests of the files that benchmarks are read from.
        file: the recipe's file, for messages.

    Raises:
        RecipeError: stages that cannot follow each other, each with what to write instead.
    """
    builder = _Builder(recipe, rows, model, digests)
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


def contamination_step(config: ContaminationConfig, digests: DigestCache) -> Step:
    """The step that indexes the items of benchmarks."""
    benchmarks = identify_benchmarks(
        config.benchmarks, config.task_folders, config.offline_root, digests
    )
    return Step("contamination", config, {"benchmarks": benchmarks}, config.produces)


@dataclass(frozen=True)
class _Evaluation:
    """Two evaluations with the same settings."""

    base: Output
    candidate: Output
    model: Input
    """What the candidate's numbers are of."""


@dataclass
class _Builder:
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
    evaluations: dict[str, _Evaluation] = field(default_factory=dict)
    """By the name of the candidate's step."""

    def __post_init__(self) -> None:
        if isinstance(self.base, ModelReference) and self.base.kind == "gguf":
            self.base = self._add("convert", ConvertConfig(), {"weights": self.base})
        self.current: Input = self.base
        self.last_dataset: str | None = None
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
            case GateConfig():
                self._add_gate(where, config)

    # One method a stage kind

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

    def _add_training(self, where: str, config: TrainingConfig) -> None:
        name = config.dataset
        if isinstance(config, PretrainConfig) and config.replay is not None:
            name = self._add_replay(where, config.dataset, config.replay)
        dataset = self._prepare(f"{where}.dataset", name)
        model = self._model(f"{where}.model", config.model)
        if isinstance(model, Output) and model.kind == "adapter":
            fix = "put `- merge: {}` before this stage, or train all weights there"
            self._problem(where, f"starts from the adapter that `{model.step}` leaves", fix)
        if dataset is None:
            return
        kind: ArtifactKind = "adapter" if config.adapter else "model"
        config = config.model_copy(update={"dtype": resolve_dtype(config.dtype)})
        inputs: dict[str, Input] = {"model": model, "dataset": dataset}
        if isinstance(config, OnlineConfig):
            inputs.update(self._rewards(where, config))
        if isinstance(config, DpoConfig | KtoConfig) and config.reference == "cached":
            inputs["reference"] = self._add_reference(config, inputs)
        if isinstance(config, RewardConfig):
            output = self._add(config.stage, config, inputs, "reward")
            self.rewards[output.step] = output
        else:
            self._leave_model(self._add(config.stage, config, inputs, kind), name)

    def _add_reference(self, config: DpoConfig | KtoConfig, inputs: Mapping[str, Input]) -> Output:
        """Score the answers once, for every stage that compares with the same model."""
        micro = config.micro_batch_size
        reference = ReferenceConfig(
            method=config.stage,
            max_length=config.batching.max_length,
            max_held_out_rows=config.validation.max_rows,
            mismatch=micro if isinstance(config, KtoConfig) else 1,
            dtype=config.dtype,
            micro_batch_size=micro,
        )
        for other in self.steps:
            if (other.config, other.inputs) == (reference, dict(inputs)):
                return other.output
        return self._add("reference", reference, inputs)

    def _rewards(self, where: str, config: OnlineConfig) -> Iterator[tuple[str, Input]]:
        """What scores the answers and what watches over it, by the names of the stage's inputs."""
        for term in config.terms:
            source = self._reward(where, term)
            if source is not None:
                yield REWARD + term.name, source
        watch = config.watch
        if watch.tasks:
            yield (
                "benchmarks",
                identify_benchmarks(watch.tasks, (), watch.offline_root, self.digests),
            )

    def _reward(self, where: str, term: RewardTerm) -> Input | None:
        if term.model is None:
            path = str(term.function).rpartition(":")[0]
            if Path(path).is_file():
                return Code(path, self.digests.file_digest(Path(path)))
            self._problem(f"{where}.reward", f"there is no file {path}", "write FILE.py:NAME")
        elif term.model in self.rewards:
            return self.rewards[term.model]
        else:
            known = ", ".join(self.rewards) or "none"
            fix = f"put `- reward: {{dataset: ...}}` before it; reward stages so far: {known}"
            self._problem(f"{where}.reward", f"no stage before it is `{term.model}`", fix)
        return None

    def _add_replay(self, where: str, dataset: str, replay: Replay) -> str:
        """Mix general text into a training dataset; returns the name of the mix."""
        name = f"{dataset}-with-{replay.dataset}".lower()
        share = MixShare(dataset=replay.dataset, fraction=replay.fraction)
        mix = MixConfig(name=name, sources=(MixSource(dataset=dataset),), replay=share)
        if name not in self.prepared:
            self._add_mix(f"{where}.replay", mix)
        return name

    def _add_merge(self, where: str, config: MergeConfig) -> None:
        if config.quantization is not None:
            message = "is known from the stage that trained the adapter"
            self._problem(f"{where}.quantization", message, "remove it")
        if config.models:
            self._add_merge_of_several(where, config)
            return
        model = self._model(f"{where}.model", config.model)
        if not (isinstance(model, Output) and model.kind == "adapter"):
            before = "no stage before it trains an adapter"
            if isinstance(model, Output):
                before = f"`{model.step}` leaves all weights"
            self._problem(where, f"there is nothing to merge: {before}", "remove this stage")
            return
        ancestry = Ancestry(self.steps)
        self.problems += folding_problems(where, model, ancestry)
        config = config.model_copy(update={"quantization": ancestry.quantization(model)})
        prompts = next(iter(ancestry.learned_from(model).values()))
        output = self._add("merge", config, {"model": model, "prompts": prompts})
        self._leave_model(output, self.trained_on[model.step])

    def _add_merge_of_several(self, where: str, config: MergeConfig) -> None:
        known = len(self.problems)
        models = {
            source.model: self._model(f"{where}.models[{position}].model", source.model)
            for position, source in enumerate(config.models)
        }
        ancestry = Ancestry(self.steps)
        base = ancestry.last_shared(list(models.values()))
        if config.base is not None:
            base = self._model(f"{where}.base", config.base)
        if len(self.problems) == known:
            self.problems += merge_problems(where, config, models, base, ancestry)
        if len(self.problems) > known:
            return
        inputs = merge_inputs(config, models, base, ancestry)
        output = self._add("merge", config, inputs, config.into)
        steps = [model.step for model in models.values() if isinstance(model, Output)]
        trained = [self.trained_on[step] for step in steps if step in self.trained_on]
        self._leave_model(output, trained[-1])

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
            self.evaluations[base.step] = _Evaluation(base, base, candidate)
            return
        of_base = config.model_copy(update={"model": None})
        base = self._evaluate_base(of_base, {"model": self.base, **inputs})
        output = self._add("evaluate", config, {"model": candidate, **inputs})
        self.evaluations[output.step] = _Evaluation(base, output, candidate)

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

    def _gate_inputs(self, config: GateConfig, judged: list[_Evaluation]) -> dict[str, Input]:
        """The evaluations, and what watched over the candidates while they were trained."""
        inputs: dict[str, Input] = {"base": judged[0].base}
        for one in judged:
            name = f"candidate:{one.candidate.step}" if config.candidates else "candidate"
            inputs[name] = one.candidate
            for step in Ancestry(self.steps).trained_by(one.model):
                if isinstance(step.config, OnlineConfig):
                    inputs[f"watch:{step.name}"] = step.output
        return inputs

    # What they share

    def _add(
        self,
        name: str,
        config: StageConfig,
        inputs: Mapping[str, Input],
        kind: ArtifactKind | None = None,
        suffix: str = "",
    ) -> Output:
        wanted = config.name or name
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


def _longest_prompt(config: TrainingConfig) -> int | None:
    """Tokens of the longest prompt that is asked, for a stage that learns from prompts."""
    return config.rollout.max_prompt_tokens if isinstance(config, OnlineConfig) else None
