"""Stages that train or merge weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from posttrain.ancestry import Ancestry
from posttrain.benchmarks import identify_benchmarks
from posttrain.building.data import DataSteps
from posttrain.hardware import resolve_dtype
from posttrain.merge_inputs import (
    default_base,
    folding_problems,
    interpolation_inputs,
    interpolation_problems,
    merge_inputs,
    merge_problems,
)
from posttrain.pipeline import Code, Input, Output
from posttrain.recipe import (
    DpoConfig,
    KtoConfig,
    MergeConfig,
    MixConfig,
    OnlineConfig,
    PretrainConfig,
    ReferenceConfig,
    RewardConfig,
    RewardTerm,
    TrainingConfig,
)
from posttrain.recipe.base import ArtifactKind
from posttrain.recipe.mix import MixShare, MixSource
from posttrain.recipe.online import REWARD
from posttrain.recipe.pretrain import Replay


class TrainingSteps(DataSteps):
    """Adds the training stages and merge."""

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
            quantization=config.quantization,
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
        if config.interpolates:
            self._add_interpolation(where, config)
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

    def _add_interpolation(self, where: str, config: MergeConfig) -> None:
        known = len(self.problems)
        model = self._model(f"{where}.model", config.model)
        if len(self.problems) == known and not (
            isinstance(model, Output) and model.step in self.trained_on
        ):
            message = "there is nothing to interpolate: no stage before it trains"
            self._problem(where, message, "put it after a stage that does, or name one as `model`")
        if len(self.problems) > known or not isinstance(model, Output):
            return
        ancestry = Ancestry(self.steps)
        if config.base is None:
            base = default_base(model, self.steps, ancestry)
        else:
            base = self._model(f"{where}.base", config.base)
        if len(self.problems) == known:
            self.problems += interpolation_problems(where, model, base, ancestry)
        if len(self.problems) > known:
            return
        inputs = interpolation_inputs(model, base, ancestry)
        output = self._add("merge", config, inputs, "model")
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
