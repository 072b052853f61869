"""Learning from several answers to each prompt, the program behind `grpo` and `rloo`."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from posttrain.evaluate.offline import stay_local
from posttrain.hardware import resolve_dtype
from posttrain.models import load_causal_lm
from posttrain.recipe.grpo import GroupConfig, GrpoConfig
from posttrain.recipe.rloo import RlooConfig
from posttrain.stages.program import StageContext, StageResult
from posttrain.train.arguments import Schedule, plan_schedule
from posttrain.train.attempts import begin, say, train_as_fits, training_process
from posttrain.train.checkpoints import newest_complete
from posttrain.train.language_modeling import load_model, save_weights
from posttrain.train.online import PromptData, leave_online_output, read_prompts
from posttrain.train.processes import (
    wait_for_all,
    world_size,
)
from posttrain.train.resources import Resources, forget_peak, resident
from posttrain.train.run import run_to_end
from posttrain.train.sharding import loading_dtype

if TYPE_CHECKING:
    from posttrain.train.callbacks import ReportProgress
    from posttrain.train.group_trainers import Asking, GroupTrainer
    from posttrain.train.history import History

Config = TypeVar("Config", bound=GroupConfig)

_UNIT = "The policy's loss, and held out the price of KL less the reward,"
"""What loss.html shows."""


def learn(context: StageContext[Config]) -> StageResult | None:
    """Learn from the rewards of answers; leave an adapter, or a full model, and its accounts.

    `training.json` has TRL's numbers of every step and what the held-out answers were worth,
    `rows.parquet` every training row; what the watch leaves is described in `train.watch`.

    Inputs: `model`, a model folder; `dataset`, a prepared dataset; `reward:NAME` for each term of
    the reward and the watch's judge. Under torchrun every process runs this; rank 0 writes the
    output and returns the result.

    Raises:
        DataError: the dataset has no row that can be asked.
        ModelError: the model has no chat template, or a loss is not a number.
        RecipeError: a reward function cannot be used, or `extra_args` cannot work.
        UsageError: a reward function failed.
    """
    stay_local(context.config.watch.offline_root)
    with training_process(context.config):
        return _learn(context)


def plan_steps(
    config: GroupConfig, prompts: int, processes: int, micro_batch_size: int | None = None
) -> Schedule:
    """Steps in which every prompt is asked `epochs` times, evaluated between two sets of answers.

    Args:
        config: The stage.
        prompts: Prompts that can be asked.
        processes: That share the answers of a step.
        micro_batch_size: Instead of the stage's own, where that needs too much memory.
    """
    schedule = plan_schedule(config, prompts * config.answers, processes, micro_batch_size)
    passes = config.passes
    steps = schedule.steps if config.max_steps else schedule.steps * passes
    every = config.validation.every_steps or math.ceil(max(1, steps // 10) / passes) * passes
    return dataclasses.replace(schedule, steps=steps, evaluate_every=min(every, steps))


def _learn(context: StageContext[Config]) -> StageResult | None:
    data = read_prompts(context)
    forget_peak()
    resources = Resources(None, resident(), context.config.micro_batch_size)

    def attempt(micro_batch_size: int) -> StageResult | None:
        trainer, asking, report = _make_trainer(context, data, micro_batch_size)
        _ask_benchmarks(context, data, trainer, "before")
        say(context, "training")
        history = run_to_end(trainer, newest_complete(context.checkpoints))
        _ask_benchmarks(context, data, trainer, "after")
        save_weights(context, trainer, data.tokenizer)
        if context.rank != 0:
            return None
        return _leave_output(context, data, trainer, asking, history, report)

    return train_as_fits(context, resources, attempt)


def _make_trainer(
    context: StageContext[Config], data: PromptData, micro_batch_size: int
) -> tuple[GroupTrainer, Asking, ReportProgress]:
    """A trainer that is ready to start, or to go on from the newest checkpoint."""
    from posttrain.train.adapters import adapter_callbacks
    from posttrain.train.callbacks import ReportProgress, training_callbacks
    from posttrain.train.group_trainers import Asking, GrpoTrainer, RlooTrainer

    config = context.config
    schedule = plan_steps(config, len(data.asked), world_size(), micro_batch_size)
    method = {**_fields(config), **_own_fields(config)}
    start = begin(context, schedule, method, load_model)
    asking = Asking(
        config,
        data.asked,
        data.held_out,
        data.reward,
        data.watch,
        schedule.steps,
        lambda: load_causal_lm(
            context.input("model"), loading_dtype(config, resolve_dtype(config.dtype))
        ),
    )

    def describe_rows(step: int) -> str:
        rows = {prompt.row.id: prompt.row for prompt in asking.asked_at(step)}
        return ", ".join(f"{row.file}:{row.row}" for row in rows.values())

    report = ReportProgress(context.events, config.launch.log_every_steps)
    callbacks = training_callbacks(
        config.validation,
        report,
        context.events,
        describe_rows,
        next_token_loss=False,
        save_at_multiples_of=config.passes,
    )
    make = RlooTrainer if isinstance(config, RlooConfig) else GrpoTrainer
    trainer = make(
        asking=asking,
        model=start.model,
        args=start.args,
        processing_class=data.tokenizer,
        callbacks=[*callbacks, *adapter_callbacks(start.model, config.adapter)],
    )
    return trainer, asking, report


def _fields(config: GroupConfig) -> dict[str, object]:
    """What TRL's GRPOConfig and RLOOConfig call by the same names."""
    return {
        "beta": config.beta,
        "epsilon": config.clip,
        "num_generations": config.answers,
        "num_generations_eval": 1,
        "num_iterations": config.passes,
        "max_completion_length": config.rollout.max_new_tokens,
        "temperature": config.rollout.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "reward_weights": [term.weight for term in config.reward],
        "disable_dropout": True,
        "remove_unused_columns": False,
        "use_vllm": config.rollout.backend == "vllm",
        "vllm_mode": "colocate",
    }


def _own_fields(config: GroupConfig) -> dict[str, object]:
    """What only one of the two has."""
    match config:
        case GrpoConfig():
            return {"loss_type": config.loss, "scale_rewards": config.scale_rewards}
        case RlooConfig():
            return {"normalize_advantages": config.normalize_advantages}
        case _:
            raise TypeError(f"{config.stage} does not learn in groups")


def _ask_benchmarks(
    context: StageContext[Config], data: PromptData, trainer: GroupTrainer, moment: str
) -> None:
    """Let the watch ask its benchmarks, on one process, while the others wait."""
    if context.rank == 0:
        model = trainer.accelerator.unwrap_model(trainer.model)
        data.watch.ask(moment, model, data.tokenizer, context.events)  # type: ignore[arg-type]
    wait_for_all()


def _leave_output(
    context: StageContext[Config],
    data: PromptData,
    trainer: GroupTrainer,
    asking: Asking,
    history: History,
    report: ReportProgress,
) -> StageResult:
    from posttrain.train.adapters import count_trainable

    trainable = count_trainable(trainer.model)
    return leave_online_output(
        context,
        data,
        history,
        trainable,
        count_asked(asking, history),
        tokens_per_second=report.tokens_per_second,
        unit=_UNIT,
        counted="steps",
    )


def count_asked(asking: Asking, history: History) -> np.ndarray | None:
    """How often each prompt was asked on the way to the saved weights.

    Not taken on trust: the prompts that the order gives for each step must have as many tokens as
    the step counted in those that it really asked.

    Args:
        asking: What was asked.
        history: Every optimizer step of the run.

    Returns:
        int64 of shape (prompts,), or None where a step read something else.
    """
    answers, passes = asking.config.answers, asking.config.passes
    for step in history.steps:
        tokens = answers * sum(len(prompt.input_ids) for prompt in asking.asked_at(step.step))
        if tokens != step.tokens - step.trained_tokens:
            return None
    until = -(-history.best.step // passes)
    return np.bincount(asking.order[:until].ravel(), minlength=len(asking.prompts))
