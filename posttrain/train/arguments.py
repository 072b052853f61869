"""From a recipe's stage to the arguments of TRL's trainers, and the check of `extra_args`."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import Problem, RecipeError
from posttrain.hardware import ResolvedDType
from posttrain.recipe.training import TrainingConfig
from posttrain.train.adapters import can_recompute_activations
from posttrain.train.quantization import optimizer_name
from posttrain.train.sharding import sharding_arguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

HAS_RECIPE_KEY = {
    "bf16": "dtype",
    "data_seed": "seed",
    "deepspeed": "launch.sharding",
    "eval_delay": "validation.every_steps",
    "eval_steps": "validation.every_steps",
    "eval_strategy": "validation.every_steps",
    "fp16": "dtype",
    "fsdp": "launch.sharding",
    "fsdp_config": "launch.sharding",
    "gradient_accumulation_steps": "batching.micro_batch_size",
    "learning_rate": "optimization.learning_rate",
    "logging_steps": "launch.log_every_steps",
    "lr_scheduler_type": "optimization.scheduler",
    "max_grad_norm": "optimization.max_grad_norm",
    "max_length": "batching.max_length",
    "max_steps": "max_steps",
    "num_train_epochs": "epochs",
    "neftune_noise_alpha": "optimization.neftune_alpha",
    "packing": "batching.packing",
    "padding_free": "batching.padding_free",
    "per_device_eval_batch_size": "batching.micro_batch_size",
    "per_device_train_batch_size": "batching.micro_batch_size",
    "save_steps": "validation.every_steps",
    "save_strategy": "validation.every_steps",
    "save_total_limit": "launch.keep_checkpoints",
    "seed": "seed",
    "warmup_ratio": "optimization.warmup",
    "warmup_steps": "optimization.warmup",
    "weight_decay": "optimization.weight_decay",
}
"""TRL's name -> the recipe's key within the stage that says the same."""

MANAGED = {
    "accelerator_config": "it decides that every process sees the same steps",
    "assistant_only_loss": "rows are tokenized and labelled before TRL sees them",
    "chat_template_path": "the chat template belongs to the model",
    "completion_only_loss": "rows are tokenized and labelled before TRL sees them",
    "dataloader_drop_last": "every row is trained on",
    "dataset_kwargs": "rows are tokenized and labelled before TRL sees them",
    "dataset_num_proc": "rows are tokenized and labelled before TRL sees them",
    "dataset_text_field": "rows are tokenized and labelled before TRL sees them",
    "ddp_backend": "it follows from the hardware",
    "disable_tqdm": "progress goes to events.jsonl",
    "do_eval": "held-out loss is always measured",
    "eos_token": "rows are tokenized and labelled before TRL sees them",
    "eval_on_start": "the loss before training is always measured",
    "eval_packing": "the held-out loss is known for each row",
    "generate_during_eval": "answers are shown by `posttrain generate`",
    "greater_is_better": "the best checkpoint has the lowest held-out loss",
    "hub_model_id": "artifacts go to the store",
    "ignore_data_skip": "a resumed run must see the rows that an uninterrupted one would",
    "is_encoder_decoder": "models are causal language models",
    "ld_alpha": "held-out rewards count every token of an answer",
    "load_best_model_at_end": "the best checkpoint is always restored",
    "log_level": "it follows `tracking.log_level`",
    "log_level_replica": "it follows `tracking.log_level`",
    "logging_nan_inf_filter": "a loss that is not a number ends the run",
    "logging_strategy": "every step is logged",
    "metric_for_best_model": "the best checkpoint has the lowest held-out loss",
    "model_init_kwargs": "the model is loaded before TRL sees it",
    "output_dir": "checkpoints go to the work directory",
    "packing_strategy": "rows are packed before TRL sees them",
    "pad_token": "the padding token belongs to the tokenizer",
    "padding_value": "the padding token belongs to the tokenizer",
    "push_to_hub": "artifacts go to the store",
    "remove_unused_columns": "rows hold nothing but what is trained on",
    "report_to": "tracking is done outside of the training process",
    "restore_callback_states_from_checkpoint": "a resumed run goes on as if never stopped",
    "resume_from_checkpoint": "a killed run is resumed by itself",
    "save_only_model": "a checkpoint must be enough to go on from",
    "shuffle_dataset": "rows are shuffled every epoch already",
    "sync_ref_model": "held-out rows are compared with one reference throughout",
    "train_sampling_strategy": "the order of the rows follows from the seed",
    "truncation_mode": "rows are tokenized and labelled before TRL sees them",
    "use_cpu": "it follows from the hardware",
}
"""TRL's name -> why posttrain sets it and a recipe cannot."""


METHOD_KEYS: dict[str, dict[str, str]] = {
    "RewardConfig": {"center_rewards_coefficient": "center"},
    "DPOConfig": {
        "beta": "beta",
        "loss_type": "loss",
        "label_smoothing": "label_smoothing",
        "precompute_ref_log_probs": "reference",
        "precompute_ref_batch_size": "batching.micro_batch_size",
    },
    "KTOConfig": {
        "beta": "beta",
        "loss_type": "loss",
        "desirable_weight": "desirable_weight",
        "undesirable_weight": "undesirable_weight",
        "precompute_ref_log_probs": "reference",
        "precompute_ref_batch_size": "batching.micro_batch_size",
    },
    "experimental.orpo.ORPOConfig": {
        "beta": "beta",
        "max_completion_length": "batching.max_length",
    },
    "GRPOConfig": {
        "beta": "beta",
        "epsilon": "clip",
        "loss_type": "loss",
        "scale_rewards": "scale_rewards",
        "num_generations": "answers",
        "num_iterations": "passes",
        "max_completion_length": "rollout.max_new_tokens",
        "temperature": "rollout.temperature",
        "reward_weights": "reward",
        "use_vllm": "rollout.backend",
    },
    "RLOOConfig": {
        "beta": "beta",
        "epsilon": "clip",
        "normalize_advantages": "normalize_advantages",
        "num_generations": "answers",
        "num_iterations": "passes",
        "max_completion_length": "rollout.max_new_tokens",
        "temperature": "rollout.temperature",
        "reward_weights": "reward",
        "use_vllm": "rollout.backend",
    },
}
"""By TRL's class: its name -> the recipe's key within the stage that says the same."""


@dataclass(frozen=True)
class Schedule:
    """How rows become optimizer steps; the same for every number of processes."""

    steps: int
    """Optimizer steps of the run, unless it stops early."""
    evaluate_every: int
    """Optimizer steps between two evaluations."""
    micro_batch_size: int
    """Rows a forward pass and process."""
    accumulation: int
    """Forward passes an optimizer step and process."""
    world_size: int
    """Processes."""

    @property
    def rows_a_pass(self) -> int:
        """Rows of one forward pass over all processes."""
        return self.micro_batch_size * self.world_size


def config_class(trl_config: str) -> type[TrainingArguments]:
    """TRL's config class of that name below `trl`, such as `experimental.orpo.ORPOConfig`."""
    import importlib
    import os

    # Whoever wrote the recipe can do nothing about TRL's warning that it may move.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    module, _, name = f"trl.{trl_config}".rpartition(".")
    found: type[TrainingArguments] = getattr(importlib.import_module(module), name)
    return found


def check_extra_args(
    names: Iterable[str], where: str = "extra_args", trl_config: str = "SFTConfig"
) -> list[Problem]:
    """What is wrong with the names under `extra_args`; an empty list means nothing.

    Imports TRL, which takes seconds: call it in a process of its own where that matters.

    Args:
        names: Names as written in the recipe.
        where: The key in the recipe that holds them, such as `stages[2].sft.extra_args`.
        trl_config: The method's config class in TRL, as the stage's `trl_config` has it.
    """
    known = {field.name for field in dataclasses.fields(config_class(trl_config)) if field.init}
    recipe_keys = {**HAS_RECIPE_KEY, **METHOD_KEYS.get(trl_config, {})}
    problems = []
    for name in names:
        key = f"{where}.{name}"
        if name in recipe_keys:
            fix = f"write `{recipe_keys[name]}` of the stage instead"
            problems.append(Problem(key, "the recipe has a key of its own for this", fix))
        elif name in MANAGED:
            problems.append(
                Problem(key, f"posttrain sets this itself: {MANAGED[name]}", "remove it")
            )
        elif name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else None
            problems.append(Problem(key, f"trl.{trl_config} has no such field", hint))
    return problems


def plan_schedule(
    config: TrainingConfig, entries: int, world_size: int, micro_batch_size: int | None = None
) -> Schedule:
    """Steps, evaluations and gradient accumulation.

    Args:
        config: The stage.
        entries: Rows, or with packing blocks, to train on.
        world_size: Processes.
        micro_batch_size: Instead of the stage's own, where that needs too much memory.
    """
    batch_size = config.batching.batch_size
    micro = micro_batch_size or config.micro_batch_size
    per_process = batch_size // world_size
    steps = config.max_steps or math.ceil(config.epochs * math.ceil(entries / batch_size))
    return Schedule(
        steps=steps,
        evaluate_every=min(config.validation.every_steps or max(1, steps // 10), steps),
        micro_batch_size=micro,
        accumulation=per_process // micro,
        world_size=world_size,
    )


def training_arguments(
    config: TrainingConfig,
    schedule: Schedule,
    checkpoints: Path,
    dtype: ResolvedDType,
    resumed: bool,
    method: Mapping[str, object],
) -> TrainingArguments:
    """TRL's arguments for a stage; `extra_args` can replace nothing of ours.

    Args:
        config: The stage.
        schedule: Its steps.
        checkpoints: Folder for checkpoints.
        dtype: Precision to compute in.
        resumed: Whether the run goes on from a checkpoint.
        method: Fields of the method's own, by TRL's names; they come last.

    Raises:
        RecipeError: a name or a value under `extra_args` is refused.
    """
    import torch

    if config.trl_config is None:
        raise TypeError(f"{config.stage} is no trainer of TRL's")
    problems = check_extra_args(config.extra_args, trl_config=config.trl_config)
    if problems:
        raise RecipeError(problems)
    cuda = torch.cuda.is_available()
    ours: dict[str, object] = {
        **_learning(config, schedule),
        **_evaluating_and_saving(config, schedule, resumed),
        **_quiet(),
        "output_dir": str(checkpoints),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": not cuda,
        **sharding_arguments(config),
    }
    if schedule.world_size > 1:
        ours["ddp_backend"] = "nccl" if cuda else "gloo"
    # Recomputing activations saves memory, which a CPU has, and costs time, which it has not.
    recompute = can_recompute_activations(config.adapter)
    defaults: dict[str, object] = {
        "gradient_checkpointing": cuda and recompute,
        "optim": optimizer_name(config.quantization),
    }
    if config.extra_args.get("gradient_checkpointing") and not recompute:
        problem = "a prefix is lost where activations are recomputed, and nothing would be trained"
        raise RecipeError([Problem("extra_args.gradient_checkpointing", problem, "remove it")])
    if not cuda:
        defaults["dataloader_pin_memory"] = False
    try:
        return config_class(config.trl_config)(
            **{**defaults, **config.extra_args, **ours, **method}
        )
    except (TypeError, ValueError) as error:
        message = f"trl.{config.trl_config} refuses: {error}"
        raise RecipeError([Problem("extra_args", message)]) from error


def _learning(config: TrainingConfig, schedule: Schedule) -> dict[str, object]:
    optimization = config.optimization
    return {
        "seed": config.seed,
        "data_seed": config.seed,
        "max_steps": schedule.steps,
        "per_device_train_batch_size": schedule.micro_batch_size,
        "per_device_eval_batch_size": schedule.micro_batch_size,
        "gradient_accumulation_steps": schedule.accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": optimization.scheduler,
        "warmup_steps": math.ceil(optimization.warmup * schedule.steps),
        "weight_decay": optimization.weight_decay,
        "max_grad_norm": optimization.max_grad_norm,
        "neftune_noise_alpha": optimization.neftune_alpha,
    }


def _evaluating_and_saving(
    config: TrainingConfig, schedule: Schedule, resumed: bool
) -> dict[str, object]:
    return {
        "eval_strategy": "steps",
        "eval_steps": schedule.evaluate_every,
        # Before the first step, once: a resumed run finds that loss in its checkpoint.
        "eval_on_start": not resumed,
        "save_strategy": "steps",
        "save_steps": schedule.evaluate_every,
        "save_total_limit": config.launch.keep_checkpoints + 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,
    }


def _quiet() -> dict[str, object]:
    return {
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "steps",
        # Every step, so that a resumed run's history is the one of an uninterrupted run;
        # `log_every_steps` thins the events only.
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
    }
