"""`ppo`: proximal policy optimization with a critic, on answers that the model writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posttrain.errors import ModelError
from posttrain.evaluate.offline import stay_local
from posttrain.hardware import resolve_dtype
from posttrain.recipe.ppo import PpoConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.train.arguments import plan_schedule
from posttrain.train.attempts import say
from posttrain.train.checkpoints import newest_complete, remove_incomplete
from posttrain.train.language_modeling import load_model
from posttrain.train.online import PromptData, leave_online_output, read_prompts
from posttrain.train.processes import (
    leave_process_group,
    prepare_libraries,
    wait_for_all,
    world_size,
)
from posttrain.train.resources import Resources, forget_peak, resident

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from posttrain.train.history import History
    from posttrain.train.ppo.trainer import PpoTrainer

_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""accelerate's names of what is computed in."""


def main(context: StageContext[PpoConfig]) -> StageResult | None:
    """Train by PPO; leave an adapter, or a full model, its accounts and what the watch found.

    The critic is no part of the output: it predicts this policy's rewards and no other's.

    Inputs: `model`, a model folder; `dataset`, a prepared dataset; `reward:NAME` for each term of
    the reward and the watch's judge. Under torchrun every process runs this; rank 0 writes the
    output and returns the result.

    Raises:
        DataError: the dataset has no row that can be asked.
        ModelError: the model cannot be trained, does not fit, or a number is not finite.
        RecipeError: a reward function cannot be used.
        UsageError: a reward function failed.
    """
    stay_local(context.config.watch.offline_root)
    prepare_libraries()
    try:
        return _train(context)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise ModelError(_what_to_write(context.config, reason)) from error
    finally:
        leave_process_group()


def _train(context: StageContext[PpoConfig]) -> StageResult | None:
    forget_peak()
    resources = Resources(None, resident(), context.config.micro_batch_size)
    # The accelerator comes before the model: it gives each process its device.
    accelerator = _join_processes(context.config)
    data = read_prompts(context)
    if context.rank == 0:
        remove_incomplete(context.checkpoints)
    wait_for_all()
    trainer, policy = _make_trainer(context, data, accelerator)
    say(context, "training")
    history = trainer.run()
    _ask_benchmarks(context, data, policy, "after")
    if context.rank != 0:
        return None
    say(context, "saving")
    _save(context, data, policy)
    return resources.leave(context.output, _leave_output(context, data, trainer, history, policy))


def _join_processes(config: PpoConfig) -> Accelerator:
    import torch
    from accelerate import Accelerator

    return Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=_PRECISION[resolve_dtype(config.dtype)]
    )


def _make_trainer(
    context: StageContext[PpoConfig], data: PromptData, accelerator: Accelerator
) -> tuple[PpoTrainer, PreTrainedModel]:
    """A run that is ready to start or to go on, and its policy."""
    from posttrain.train.adapters import check_trainable, count_trainable
    from posttrain.train.ppo.models import Models
    from posttrain.train.ppo.trainer import PpoTrainer
    from posttrain.train.ppo.update import Learner
    from posttrain.train.rollout import make_rollouts

    config, tokenizer = context.config, data.tokenizer
    schedule = plan_schedule(config, len(data.asked), world_size())
    say(context, "loading the model")
    policy = load_model(context, schedule.steps)
    trainable = count_trainable(policy)
    check_trainable(trainable, adapter=config.adapter is not None)
    say(context, f"ready: {trainable}")
    if newest_complete(context.checkpoints) is None:
        _ask_benchmarks(context, data, policy, "before")
    models = Models.make(policy, config.critic.backbone)
    trainer = PpoTrainer(
        config=config,
        schedule=schedule,
        learner=Learner(config, models, accelerator, tokenizer.pad_token_id),
        rollouts=make_rollouts(policy, tokenizer, config.rollout),
        reward=data.reward,
        prompts=data.asked,
        held_out=data.held_out,
        watch=data.watch,
        accelerator=accelerator,
        events=context.events,
        checkpoints=context.checkpoints,
    )
    return trainer, policy


def _ask_benchmarks(
    context: StageContext[PpoConfig], data: PromptData, policy: PreTrainedModel, moment: str
) -> None:
    """Let the watch ask its benchmarks, on one process, while the others wait."""
    if context.rank == 0:
        data.watch.ask(moment, policy, data.tokenizer, context.events)  # type: ignore[arg-type]
    wait_for_all()


def _save(context: StageContext[PpoConfig], data: PromptData, policy: PreTrainedModel) -> None:
    from posttrain.train.outputs import cast_weights, save_adapter, save_model, stored_dtype

    base = context.input("model")
    if context.config.adapter is not None:
        save_adapter(policy, data.tokenizer, context.output, base_digest=base.digest)
        return
    cast_weights(policy, stored_dtype(base.path))
    save_model(policy, data.tokenizer, context.output)


def _leave_output(
    context: StageContext[PpoConfig],
    data: PromptData,
    trainer: PpoTrainer,
    history: History,
    policy: PreTrainedModel,
) -> StageResult:
    from posttrain.train.adapters import count_trainable

    asked = trainer.order[: history.best.step * context.config.batching.batch_size]
    return leave_online_output(
        context,
        data,
        history,
        count_trainable(policy),
        np.bincount(asked, minlength=len(data.asked)),
        tokens_per_second=trainer.tokens / max(trainer.seconds, 1e-9),
        unit="The price of KL less the reward, of an answer,",
        counted="updates",
    )


def _is_out_of_memory(error: Exception) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or bool(should_reduce_batch_size(error))


def _what_to_write(config: PpoConfig, reason: str) -> str:
    """What needs less memory, first things first."""
    advice = []
    if config.micro_batch_size > 1:
        advice.append(f"`batching: {{micro_batch_size: {config.micro_batch_size // 2}}}`")
    if config.rollout.batch_size > 1:
        advice.append(f"`rollout: {{batch_size: {config.rollout.batch_size // 2}}}`")
    if config.adapter is None:
        advice.append("`adapter: {type: lora}`, with which policy, critic and reference share")
    if config.critic.backbone == "own":
        advice.append("`critic: {backbone: shared}`")
    if config.quantization is None:
        advice.append("`quantization: {type: nf4}` with an adapter")
    advice.append(f"`rollout: {{max_new_tokens: {config.rollout.max_new_tokens // 2}}}`")
    return (
        f"out of memory ({reason}); write one of {', '.join(advice)}. "
        "`posttrain plan` shows what is needed"
    )


if __name__ == "__main__":
    run_program(PpoConfig, main)
