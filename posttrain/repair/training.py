"""Remedies that train again: gentler against forgetting and overfitting, harder to learn more."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.recipe import DpoConfig, KtoConfig, PpoConfig, TrainingConfig
from posttrain.recipe.adapters import LoraConfig
from posttrain.recipe.grpo import GroupConfig
from posttrain.repair.behind import Behind, stage_names
from posttrain.repair.remedy import (
    DPO,
    KL_PENALTY,
    LORA_FORGETS_LESS,
    RULE_OF_THUMB,
    Change,
    Confidence,
    Edit,
    Insertion,
    Path,
    Remedy,
)
from posttrain.repair.symptoms import Symptom

_GENTLER = 0.3
_MOST_EPOCHS = 4.0
_SMALLEST_RANK, _LARGEST_RANK = 4, 64


def fewer_epochs(behind: Behind, symptom: Symptom) -> Iterator[Remedy]:
    """Half the passes over the rows."""
    where, stage = _last(behind)
    name = _name(behind)
    why = f"{symptom.sentence}. Every further pass over the same rows moves the weights further"
    if stage.max_steps is not None and stage.max_steps > 1:
        steps = _whole(stage, stage.max_steps // 2)
        reason = f"was {stage.max_steps}: a shorter run moves the weights less"
        yield Remedy(
            f"max-steps-{steps}",
            f"fewer steps: {steps} instead of {stage.max_steps} in {name}",
            why,
            (Change((*where, "max_steps"), steps, reason),),
            "fair",
            (RULE_OF_THUMB,),
        )
    elif stage.epochs > 1:
        epochs = max(1.0, stage.epochs / 2)
        reason = f"was {stage.epochs:g}: fewer passes move the weights less"
        yield Remedy(
            f"epochs-{epochs:g}",
            f"fewer epochs: {epochs:g} instead of {stage.epochs:g} in {name}",
            why,
            (Change((*where, "epochs"), _plain(epochs), reason),),
            "fair",
            (RULE_OF_THUMB,),
        )


def lower_rate(
    behind: Behind, symptom: Symptom, confidence: Confidence = "fair"
) -> Iterator[Remedy]:
    """A third of the learning rate."""
    yield _rate(
        behind, _GENTLER, "lower", symptom, confidence, "smaller steps stay nearer the base"
    )


def higher_rate(behind: Behind, symptom: Symptom) -> Iterator[Remedy]:
    """Three times the learning rate."""
    yield _rate(behind, 3.0, "higher", symptom, "a try", "larger steps learn more in as many")


def lora_for_full(behind: Behind, symptom: Symptom) -> Iterator[Remedy]:
    """An adapter in place of all weights."""
    where, stage = _last(behind)
    if stage.adapter is not None:
        return
    edits: list[Edit] = [
        Change(
            (*where, "adapter"),
            {"type": "lora", "rank": LoraConfig().rank},
            "in place of all weights: LoRA learns less, and forgets less",
            in_place_of="full",
        )
    ]
    if stage.optimization.learning_rate is not None:
        rate = stage.model_copy(update={"adapter": LoraConfig()}).usual_learning_rate
        was = f"was {stage.optimization.learning_rate:g}, for all weights"
        edits.append(Change((*where, "optimization", "learning_rate"), _digits(rate), was))
    follower = _trains_on(behind)
    if follower is not None:
        body = {"name": f"merge-{_name(behind)}"}
        edits.append(Insertion(follower, "merge", {**body}, "added: the next stage needs weights"))
    yield Remedy(
        "lora",
        f"LoRA in place of full fine-tuning in {_name(behind)}",
        f"{symptom.sentence}. An adapter of low rank cannot move the weights as far",
        tuple(edits),
        "good" if stage.stage != "pretrain" else "fair",
        (LORA_FORGETS_LESS, RULE_OF_THUMB),
    )


def other_rank(behind: Behind, symptom: Symptom, times: float) -> Iterator[Remedy]:
    """Half the rank against forgetting, twice the rank to learn more."""
    where, stage = _last(behind)
    adapter = stage.adapter
    if not isinstance(adapter, LoraConfig):
        return
    rank = round(adapter.rank * times)
    if not _SMALLEST_RANK <= rank <= _LARGEST_RANK or rank == adapter.rank:
        return
    word = "smaller" if times < 1 else "higher"
    edits = [Change((*where, "adapter", "rank"), rank, f"was {adapter.rank}")]
    if adapter.alpha is not None:
        alpha = _plain(adapter.alpha * times)
        edits.append(
            Change((*where, "adapter", "alpha"), alpha, f"was {adapter.alpha:g}: as the rank")
        )
    reason = "has less room to move the weights" if times < 1 else "can learn more"
    yield Remedy(
        f"rank-{rank}",
        f"{word} rank: {rank} instead of {adapter.rank} in {_name(behind)}",
        f"{symptom.sentence}. An adapter of {word} rank {reason}",
        tuple(edits),
        "a try",
        (RULE_OF_THUMB, LORA_FORGETS_LESS),
    )


def stay_closer(behind: Behind, symptom: Symptom) -> Iterator[Remedy]:
    """A higher price of moving away from the model as it was before the stage."""
    where, stage = _last(behind)
    name = _name(behind)
    why = f"{symptom.sentence}. A higher price keeps {name} closer to the model as it was"
    match stage:
        case DpoConfig() | KtoConfig():
            path, was, value, source = (*where, "beta"), stage.beta, stage.beta * 2, DPO
        case GroupConfig():
            path, was, source = (*where, "beta"), stage.beta, KL_PENALTY
            value = stage.beta * 2.5 or 0.04
        case PpoConfig() if stage.kl.target is not None:
            path, was, source = (*where, "kl", "target"), stage.kl.target, KL_PENALTY
            value = stage.kl.target / 2
        case PpoConfig():
            path, was, source = (*where, "kl", "coef"), stage.kl.coef, KL_PENALTY
            value = stage.kl.coef * 2 or 0.05
        case _:
            return
    key, value = ".".join(map(str, path[3:])), _digits(value)
    yield Remedy(
        f"{key.replace('.', '-')}-{value:g}",
        f"stay closer: {name}.{key} {value:g} instead of {was:g}",
        why,
        (Change(path, value, f"was {was:g}: closer to the model as it was"),),
        "fair",
        (source,),
    )


def more_epochs(behind: Behind, symptom: Symptom) -> Iterator[Remedy]:
    """Twice the passes, up to what is usual."""
    where, stage = _last(behind)
    name = _name(behind)
    why = f"{symptom.sentence}. It may not have been trained for long enough"
    if stage.max_steps is not None:
        steps = stage.max_steps * 2
        yield Remedy(
            f"max-steps-{steps}",
            f"more steps: {steps} instead of {stage.max_steps} in {name}",
            why,
            (Change((*where, "max_steps"), steps, f"was {stage.max_steps}"),),
            "fair",
            (RULE_OF_THUMB,),
        )
    elif stage.epochs < _MOST_EPOCHS:
        epochs = min(stage.epochs * 2, _MOST_EPOCHS)
        yield Remedy(
            f"epochs-{epochs:g}",
            f"more epochs: {epochs:g} instead of {stage.epochs:g} in {name}",
            why,
            (Change((*where, "epochs"), _plain(epochs), f"was {stage.epochs:g}"),),
            "fair",
            (RULE_OF_THUMB,),
        )


def more_data(behind: Behind, symptom: Symptom) -> Iterator[Remedy]:
    """All rows of a dataset that was cut short, or rows that a person has to find."""
    stage = _last(behind)[1]
    recipe = behind.recipe
    names = [name for name in recipe.made_of(stage.dataset) if name in recipe.datasets]
    cut = [name for name in names if recipe.datasets[name].limit is not None]
    edits = []
    for name in cut:
        limit = (recipe.datasets[name].limit or 1) * 4
        why = f"was {recipe.datasets[name].limit}: more rows"
        edits.append(Change(("datasets", name, "limit"), limit, why))
    yield Remedy(
        "more-rows" + "".join(f"-{edit.value}" for edit in edits),
        f"more rows of {' and '.join(cut or names)}",
        f"{symptom.sentence}. Rows that are seen for the first time teach more than a further pass",
        tuple(edits),
        "good",
        (RULE_OF_THUMB,),
        ""
        if edits
        else f"collect more rows like those of {' and '.join(names)}; check them with "
        f"`posttrain data`",
    )


def last_trained(behind: Behind) -> tuple[Path, TrainingConfig]:
    """Where the last training stage before the gate stands, and its settings."""
    return _last(behind)


def _rate(
    behind: Behind, times: float, word: str, symptom: Symptom, confidence: Confidence, reason: str
) -> Remedy:
    where, stage = _last(behind)
    rate = _digits(stage.learning_rate * times)
    stated = "" if stage.optimization.learning_rate else ", the default"
    why = f"was {stage.learning_rate:g}{stated}: {reason}"
    return Remedy(
        f"learning-rate-{rate:g}",
        f"{word} learning rate: {rate:g} instead of {stage.learning_rate:g} in {_name(behind)}",
        f"{symptom.sentence}. {reason[0].upper()}{reason[1:]}",
        (Change((*where, "optimization", "learning_rate"), rate, why),),
        confidence,
        (RULE_OF_THUMB,),
    )


def _last(behind: Behind) -> tuple[Path, TrainingConfig]:
    position = behind.trained[0]
    stage = behind.recipe.stages[position]
    if not isinstance(stage, TrainingConfig):
        raise TypeError(f"stage {position} trains nothing")
    return ("stages", position, stage.stage), stage


def _name(behind: Behind) -> str:
    return stage_names(behind.recipe)[behind.trained[0]]


def _trains_on(behind: Behind) -> int | None:
    """The next stage, if it trains from the last trained model by standing after it."""
    position = behind.trained[0]
    stages = behind.recipe.stages
    for n in range(position + 1, len(stages)):
        if getattr(stages[n], "produces", None) == "model" and stages[n].stage == "merge":
            return None
        if isinstance(stages[n], TrainingConfig) and getattr(stages[n], "model", None) is None:
            return n
    return None


def _whole(stage: TrainingConfig, steps: int) -> int:
    """Steps as a multiple of the passes over the same answers."""
    passes = stage.passes if isinstance(stage, GroupConfig) else 1
    return max(steps // passes, 1) * passes


def _digits(value: float) -> float:
    """Two significant digits."""
    return float(f"{value:.2g}")


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value
