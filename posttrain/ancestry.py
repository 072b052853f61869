"""What a model of a pipeline comes from: the models before it, its adapter, its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain.pipeline import Input, Output, Step
from posttrain.recipe import MergeConfig, TrainingConfig
from posttrain.recipe.adapters import AdapterConfig, Quantization
from posttrain.recipe.merge import PROMPTS, SOURCE


class Ancestry:
    """Answers questions about the models of the steps laid out so far."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = {step.name: step for step in steps}

    def base_of(self, adapter: Output) -> Input:
        """The model that an adapter was trained on."""
        return self._steps[adapter.step].inputs["model"]

    def last_shared(self, models: Sequence[Input]) -> Input:
        """The last complete model that all of these come from, or are.

        Models of one pipeline share at least the recipe's base.
        """
        first, *others = [self._complete_models(model) for model in models]
        return next(model for model in first if all(model in other for other in others))

    def adapter(self, model: Input) -> AdapterConfig | None:
        """How the adapter was trained; None for complete weights and for combined adapters."""
        config = self._config(model)
        return config.adapter if isinstance(config, TrainingConfig) else None

    def quantization(self, model: Input) -> Quantization | None:
        """How the base was held while the adapter was trained."""
        config = self._config(model)
        return config.quantization if isinstance(config, TrainingConfig) else None

    def trained_by(self, model: Input) -> list[Step]:
        """The training stages behind a model, the last one first."""
        steps, waiting = [], [model]
        while waiting:
            source = waiting.pop(0)
            if not isinstance(source, Output) or source.kind not in ("model", "adapter"):
                continue
            step = self._steps[source.step]
            if isinstance(step.config, TrainingConfig) and step not in steps:
                steps.append(step)
            names = [name for name in step.inputs if name == "model" or name.startswith(SOURCE)]
            waiting += [step.inputs[name] for name in names]
        return steps

    def learned_from(self, model: Input) -> dict[str, Output]:
        """The prepared datasets that a model was last trained on, by name.

        Of a merge: those of all that was merged.
        """
        if not isinstance(model, Output):
            return {}
        step = self._steps[model.step]
        if isinstance(step.config, TrainingConfig):
            return _outputs({step.config.dataset: step.inputs["dataset"]})
        if isinstance(step.config, MergeConfig) and not step.config.models:
            return self.learned_from(step.inputs["model"])
        return _outputs(
            {
                name.removeprefix(PROMPTS): value
                for name, value in step.inputs.items()
                if name.startswith(PROMPTS)
            }
        )

    def _config(self, model: Input) -> object:
        return self._steps[model.step].config if isinstance(model, Output) else None

    def _complete_models(self, model: Input) -> list[Input]:
        """The model and those before it, the nearest first, without the adapters among them."""
        if not isinstance(model, Output):
            return [model]
        inputs = self._steps[model.step].inputs
        merged = [value for name, value in inputs.items() if name.startswith(SOURCE)]
        before: list[Input] = []
        if "model" in inputs:
            before = self._complete_models(inputs["model"])
        elif merged:
            before = self._complete_models(self.last_shared(merged))
        return [model, *before] if model.kind == "model" else before


def _outputs(datasets: Mapping[str, Input]) -> dict[str, Output]:
    return {name: value for name, value in datasets.items() if isinstance(value, Output)}
