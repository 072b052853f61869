"""What a merge starts from, and what cannot be merged: said before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain.ancestry import Ancestry
from posttrain.errors import Problem
from posttrain.pipeline import Input, Output, Step
from posttrain.recipe import MergeConfig
from posttrain.recipe.adapters import ADAPTERS, AdapterConfig, LoraConfig
from posttrain.recipe.merge import PROMPTS, SOURCE


def folding_problems(where: str, model: Input, ancestry: Ancestry) -> list[Problem]:
    """Why an adapter cannot become part of its base's weights; complete weights always can."""
    adapter = ancestry.adapter(model)
    if adapter is None or adapter.mergeable or not isinstance(model, Output):
        return []
    kind = next(name for name, known in ADAPTERS.items() if isinstance(adapter, known))
    message = f"the {kind} adapter of `{model.step}` cannot become part of the weights"
    return [Problem(where, message, "leave the merge out: `evaluate` takes adapters as they are")]


def merge_problems(
    where: str, config: MergeConfig, models: Mapping[str, Input], base: Input, ancestry: Ancestry
) -> list[Problem]:
    """Why these models cannot be merged in this way.

    Args:
        where: key of the stage.
        config: the stage; merges several.
        models: what is merged, by the names in the recipe.
        base: what the method measures changes from.
        ancestry: of the steps laid out so far.
    """
    if config.into == "adapter":
        return _combination_problems(where, config, models, ancestry)
    problems = []
    for position, model in enumerate(models.values()):
        problems += folding_problems(f"{where}.models[{position}].model", model, ancestry)
    if config.needs_base and isinstance(base, Output) and base.kind == "adapter":
        message = f"`{base.step}` leaves an adapter, and changes are measured from all weights"
        problems.append(Problem(f"{where}.base", message, "name the stage that folds it in"))
    for name, model in models.items():
        if config.needs_base and model == base:
            message = f"changes are measured from `{name}`, so it adds none itself"
            fix = "take it out of `models`, or write another `base`"
            problems.append(Problem(where, message, fix))
    return problems


def merge_inputs(
    config: MergeConfig, models: Mapping[str, Input], base: Input, ancestry: Ancestry
) -> dict[str, Input]:
    """What a merge of several reads: models, base, held-out rows of all that they learned from."""
    inputs = {SOURCE + name: model for name, model in models.items()}
    if config.into == "adapter":
        # Under this name a stage that makes an adapter has the model that it belongs to.
        inputs["model"] = base
    elif config.needs_base:
        inputs["base"] = base
    for model in models.values():
        for dataset, rows in ancestry.learned_from(model).items():
            inputs.setdefault(PROMPTS + dataset, rows)
    return inputs


def default_base(model: Output, steps: Sequence[Step], ancestry: Ancestry) -> Input:
    """What an interpolation goes back towards: the last complete model that one was trained from.

    Folding and merging train nothing: of their results it is what the adapter, or all that was
    merged, comes from.
    """
    if model.kind == "adapter":
        return ancestry.last_shared([model])
    inputs = next(step.inputs for step in steps if step.name == model.step)
    if "base" in inputs:
        return inputs["base"]
    behind = [value for name, value in inputs.items() if name == "model" or name.startswith(SOURCE)]
    return ancestry.last_shared(behind)


def interpolation_problems(
    where: str, model: Input, base: Input, ancestry: Ancestry
) -> list[Problem]:
    """Why nothing lies between these two.

    Args:
        where: key of the stage.
        model: what was trained.
        base: what is gone back towards.
        ancestry: of the steps laid out so far.
    """
    problems = folding_problems(f"{where}.model", model, ancestry)
    if isinstance(base, Output) and base.kind == "adapter":
        message = f"`{base.step}` leaves an adapter, and changes are measured from all weights"
        problems.append(Problem(f"{where}.base", message, "name the stage that folds it in"))
    if model == base:
        message = "model and base are the same, so nothing lies between them"
        problems.append(Problem(where, message, "name another `model`, or another `base`"))
    return problems


def interpolation_inputs(model: Input, base: Input, ancestry: Ancestry) -> dict[str, Input]:
    """What an interpolation reads: both ends, and held-out rows of what the model learned from."""
    rows = ancestry.learned_from(model)
    return {
        "model": model,
        "base": base,
        **{PROMPTS + name: output for name, output in rows.items()},
    }


def _combination_problems(
    where: str, config: MergeConfig, models: Mapping[str, Input], ancestry: Ancestry
) -> list[Problem]:
    """PEFT combines plain LoRA adapters of one base."""
    apart = "leave out `into: adapter`, and adapters are folded in first"
    adapters: dict[str, Output] = {}
    for name, model in models.items():
        if not isinstance(model, Output) or model.kind != "adapter":
            return [Problem(where, f"`{name}` is no adapter, so no adapter can come out", apart)]
        trained = ancestry.adapter(model)
        if trained is not None and not _is_plain_lora(trained):
            message = f"the adapter of `{name}` is not plain LoRA, which PEFT can combine"
            return [Problem(where, message, apart)]
        adapters[name] = model
    first, *others = adapters
    for other in others:
        if ancestry.base_of(adapters[other]) != ancestry.base_of(adapters[first]):
            message = f"`{first}` and `{other}` were trained on different models"
            return [Problem(where, message, apart)]
    return _rank_problems(where, config, [ancestry.adapter(model) for model in adapters.values()])


def _rank_problems(
    where: str, config: MergeConfig, adapters: Sequence[AdapterConfig | None]
) -> list[Problem]:
    ranks = sorted({_saved_rank(one) for one in adapters if isinstance(one, LoraConfig)})
    if config.takes_any_ranks or len(ranks) < 2:
        return []
    method = "svd" if config.method == "linear" else f"{config.method}_svd"
    message = f"`{config.method}` needs adapters of one rank, and these have {_list(ranks)}"
    return [Problem(f"{where}.method", message, f"write `method: {method}`")]


def _is_plain_lora(adapter: AdapterConfig) -> bool:
    """Whether an adapter is two matrices beside each weight and nothing else."""
    return isinstance(adapter, LoraConfig) and not adapter.dora


def _saved_rank(adapter: LoraConfig) -> int:
    """PiSSA is saved as what it added to and took from the weights: twice its rank."""
    return adapter.rank * 2 if adapter.init == "pissa" else adapter.rank


def _list(ranks: Sequence[int]) -> str:
    return " and ".join(str(rank) for rank in ranks)
