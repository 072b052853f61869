"""Where a recipe differs from what would be advised for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from posttrain.advisor import memory
from posttrain.advisor.engine import Advice
from posttrain.advisor.situation import Situation
from posttrain.recipe.adapters import LoraConfig
from posttrain.recipe.evaluate import EvaluateConfig
from posttrain.recipe.gate import GateConfig
from posttrain.recipe.merge import MergeConfig
from posttrain.recipe.mix import MixConfig
from posttrain.recipe.pretrain import PretrainConfig
from posttrain.recipe.recipe import Recipe
from posttrain.recipe.sft import SftConfig
from posttrain.recipe.training import TrainingConfig

Severity = Literal["error", "warning", "note"]

_ORDER: tuple[Severity, ...] = ("error", "warning", "note")
_MOST_EPOCHS = 4.0
"""Two to four are a standard start: practitioners' rule of thumb."""
_GENERAL = ("mmlu", "hellaswag")


@dataclass(frozen=True)
class Remark:
    """One difference between a recipe and the advice."""

    severity: Severity
    """`error`: it will fail. `warning`: it will probably disappoint. `note`: worth a thought."""
    where: str
    """Key in the recipe."""
    message: str
    instead: str
    """What to write."""


def review(recipe: Recipe, advice: Advice) -> tuple[Remark, ...]:
    """Compare a recipe with the advice for its situation, the gravest remarks first."""
    remarks = [*_method(recipe, advice), *_proof(recipe)]
    for position, stage in enumerate(recipe.stages):
        if isinstance(stage, TrainingConfig):
            where = f"stages[{position}].{stage.stage}"
            remarks += _training(stage, where, advice)
    return tuple(sorted(remarks, key=lambda remark: _ORDER.index(remark.severity)))


def _training(stage: TrainingConfig, where: str, advice: Advice) -> Iterator[Remark]:
    yield from _memory(stage, where, advice)
    yield from _rank(stage, where, advice)
    yield from _duration(stage, where, advice)
    yield from _learning_rate(stage, where)


def _memory(stage: TrainingConfig, where: str, advice: Advice) -> Iterator[Remark]:
    """What is trained, against the memory and the number of rows."""
    situation = advice.situation
    weights = _weights(stage)
    if not memory.fits(weights, situation.sizes, situation.device):
        needed = _needed(weights, situation)
        smaller = "QLoRA: `quantization: {type: nf4}`" if weights == "lora" else "an adapter"
        if weights == "qlora":
            smaller = "a smaller model, or shorter rows"
        tight = needed <= situation.memory_gb and weights != "qlora"
        yield Remark(
            "warning" if tight else "error",
            where,
            f"{_named(weights)} needs about {needed:.0f} GiB at the default batch and length, and "
            f"there are {situation.memory_gb:.0f}",
            f"take {smaller}",
        )
    elif weights == "qlora" and situation.lora_fits:
        yield Remark(
            "note",
            f"{where}.quantization",
            "LoRA on unquantized weights fits as well, trains faster and loses nothing to 4 bits",
            "leave `quantization` out",
        )
    advised = advice.pretrain_weights if isinstance(stage, PretrainConfig) else advice.weights
    if weights == "full" and advised in ("lora", "qlora") and _few(advice):
        yield Remark(
            "warning",
            f"{where}.adapter",
            f"all weights are trained on {situation.rows:,} examples, which they learn by heart",
            "write `adapter: {type: lora, rank: 8}`",
        )


def _rank(stage: TrainingConfig, where: str, advice: Advice) -> Iterator[Remark]:
    adapter = stage.adapter
    if not isinstance(adapter, LoraConfig):
        return
    set_by_rule = advice.setting(f"{stage.stage}.adapter.rank")
    advised = int(set_by_rule) if set_by_rule is not None else LoraConfig().rank
    key = f"{where}.adapter.rank"
    if adapter.rank >= 4 * advised:
        yield Remark(
            "warning" if _few(advice) else "note",
            key,
            f"rank {adapter.rank} is high: it saves less memory and overfits sooner",
            f"start with {advised}, and measure 4, 8, 16 and 32",
        )
    elif 4 * adapter.rank <= advised:
        yield Remark(
            "note",
            key,
            f"rank {adapter.rank} may be too low to learn the task",
            f"start with {advised}, and measure 4, 8, 16 and 32",
        )
    ratio = adapter.scale_alpha / adapter.rank
    if not adapter.rank_stabilized and not 0.5 <= ratio <= 4:
        yield Remark(
            "note",
            f"{where}.adapter.alpha",
            f"the update is scaled by alpha/rank = {ratio:g}, and 2 is usual",
            "leave `alpha` out, or change the learning rate instead",
        )


def _duration(stage: TrainingConfig, where: str, advice: Advice) -> Iterator[Remark]:
    if stage.epochs > _MOST_EPOCHS and stage.max_steps is None:
        advised = advice.setting(f"{stage.stage}.epochs") or 3
        yield Remark(
            "warning",
            f"{where}.epochs",
            f"{stage.epochs:g} epochs: beyond four the model learns its rows by heart and forgets "
            "others",
            f"write `epochs: {advised}`",
        )
    if stage.validation.patience is None:
        yield Remark(
            "warning",
            f"{where}.validation.patience",
            "training goes on when the held-out loss rises",
            "leave it out: the best checkpoint is kept, and training stops after three "
            "evaluations without improvement",
        )


def _learning_rate(stage: TrainingConfig, where: str) -> Iterator[Remark]:
    """Against the default of the method, which is where a rate begins."""
    times = stage.learning_rate / stage.usual_learning_rate
    if 1 / 5 < times < 5:
        return
    far = times >= 10 or times <= 1 / 10
    shown = f"{times:.3g} times" if times >= 1 else f"a {1 / times:.3g}th of"
    yield Remark(
        "warning" if far else "note",
        f"{where}.optimization.learning_rate",
        f"{stage.learning_rate:g} is {shown} the usual start of this method",
        f"start with {stage.usual_learning_rate:g}: leave it out",
    )


def _method(recipe: Recipe, advice: Advice) -> Iterator[Remark]:
    """Stages that are missing, or in the way."""
    kinds = [stage.stage for stage in recipe.stages]
    situation = advice.situation
    if "pretrain" in advice.stages and "pretrain" not in kinds:
        yield Remark(
            "warning",
            "stages",
            "knowledge is the goal, and SFT alone learns unknown facts slowly and encourages to "
            "invent others",
            "put `pretrain` on raw text before `sft`, or add retrieval",
        )
    if "pretrain" in kinds and "sft" not in kinds[kinds.index("pretrain") :]:
        yield Remark(
            "warning",
            "stages",
            "continued pretraining undoes some of a chat model's manners, and no SFT follows it",
            "put `sft` after `pretrain`",
        )
    for position, stage in enumerate(recipe.stages):
        if isinstance(stage, PretrainConfig) and stage.replay is None:
            yield Remark(
                "warning",
                f"stages[{position}].pretrain.replay",
                "nothing works against forgetting what the domain's text does not hold",
                "write `replay: {dataset: ..., fraction: 0.1}` with general text",
            )
        if isinstance(stage, SftConfig) and stage.adapter is None and not _replays(recipe, stage):
            yield Remark(
                "note",
                f"stages[{position}].sft.dataset",
                "all weights are trained on the task's rows alone, which forgets the rest",
                "mix in 5 to 10% of general instructions: a `mix` with `replay`",
            )
    if situation.tasks > 1 and not any(isinstance(stage, MixConfig) for stage in recipe.stages):
        yield Remark(
            "note",
            "stages",
            f"{situation.tasks} tasks are learnt without a mix",
            "put their datasets into one `mix`, or train an adapter for each",
        )


def _proof(recipe: Recipe) -> Iterator[Remark]:
    """Whether anything shows that the model got better, and forgot nothing."""
    evaluations = [stage for stage in recipe.stages if isinstance(stage, EvaluateConfig)]
    trained = [stage for stage in recipe.stages if isinstance(stage, TrainingConfig)]
    if not trained:
        return
    if not evaluations:
        yield Remark(
            "warning",
            "stages",
            "nothing measures what the model learnt, or forgot",
            f"add `- evaluate: {{tasks: [{', '.join(_GENERAL)}], limit: 200}}`",
        )
    elif not any(_is_general(task) for stage in evaluations for task in stage.tasks):
        position = recipe.stages.index(evaluations[0])
        yield Remark(
            "warning",
            f"stages[{position}].evaluate.tasks",
            "no general benchmark shows what the model forgot",
            f"add {' and '.join(_GENERAL)}; a drop of more than two or three points is forgetting",
        )
    if not any(isinstance(stage, GateConfig) for stage in recipe.stages):
        yield Remark(
            "note",
            "stages",
            "nothing keeps a worse model from being used",
            "add `- gate: {}` after `evaluate`",
        )
    last = trained[-1]
    merged = any(
        isinstance(stage, MergeConfig) for stage in recipe.stages[recipe.stages.index(last) :]
    )
    if last.adapter is not None and last.adapter.mergeable and not merged:
        yield Remark(
            "note",
            "stages",
            "the adapter stays apart from its base, which makes every answer a little slower",
            "add `- merge: {}`, unless several adapters share one base",
        )


def _needed(weights: memory.Weights, situation: Situation) -> float:
    """GiB a device, by the measure that decides whether it fits."""
    if weights == "qlora":
        return situation.qlora_gb
    several = situation.device.count > 1
    return memory.need(weights, situation.sizes, situation.device, sharded=several)


def _weights(stage: TrainingConfig) -> memory.Weights:
    if stage.adapter is None:
        return "full"
    return "qlora" if stage.quantization is not None else "lora"


def _named(weights: memory.Weights) -> str:
    return {
        "full": "training all weights",
        "lora": "LoRA on unquantized weights",
        "qlora": "QLoRA",
    }[weights]


def _few(advice: Advice) -> bool:
    """Whether the rule for few examples holds."""
    return any(note.rule == "few-examples" for note in advice.reasons)


def _replays(recipe: Recipe, stage: SftConfig) -> bool:
    return any(
        isinstance(other, MixConfig) and other.name == stage.dataset and other.replay is not None
        for other in recipe.stages
    )


def _is_general(task: str) -> bool:
    return task.startswith((*_GENERAL, "truthfulqa", "arc_", "winogrande", "leaderboard"))
