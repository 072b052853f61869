"""Training state divided over the processes: DeepSpeed ZeRO, or PyTorch's FSDP2.

Importing this module imports nothing heavy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from posttrain.errors import Problem, RecipeError, UsageError
from posttrain.hardware import ResolvedDType
from posttrain.recipe.training import Sharding, TrainingConfig

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

JsonObject = dict[str, JsonValue]

_FROM_TRAINER: JsonObject = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    # torch's AdamW, as without sharding, so that both learn the same. With `offload` it steps on
    # the CPU several times as slowly as DeepSpeedCPUAdam, which is compiled at its first use and
    # rounds otherwise: time that a large batch hides and a small one does not.
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""What transformers fills in from its own arguments, and which optimizer takes the steps."""

_DIVISION = "sharding.txt"

_SAID_BY_RECIPE = {
    "train_batch_size": "batching.batch_size",
    "train_micro_batch_size_per_gpu": "batching.micro_batch_size",
    "gradient_accumulation_steps": "batching.micro_batch_size",
    "gradient_clipping": "optimization.max_grad_norm",
    "optimizer": "optimization",
    "scheduler": "optimization.scheduler",
    "bf16.enabled": "dtype",
    "fp16.enabled": "dtype",
    "amp": "dtype",
    "torch_autocast": "dtype",
}
"""DeepSpeed's key -> the recipe's key within the stage that says the same."""

_OURS = {
    "zero_allow_untested_optimizer": "the optimizer is torch's AdamW, as without sharding",
    "zero_force_ds_cpu_optimizer": "the optimizer is torch's AdamW, as without sharding",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "models are saved complete",
}
"""DeepSpeed's key -> why posttrain sets it and a file cannot."""


def prepare_sharding(sharding: Sharding | None) -> None:
    """Start what the division needs. Call it before the training arguments and the model exist.

    On GPUs transformers and accelerate do all of it. On a CPU accelerate would use neither: it
    leaves DeepSpeed's communication uninitialized, so that ZeRO-3 takes the world for one process,
    and trains without FSDP, silently.
    """
    import torch

    if sharding is None or torch.cuda.is_available():
        return
    if "RANK" not in os.environ:
        raise UsageError("`launch.sharding` needs torchrun, even for one process")
    if sharding.fsdp:
        _accept_fsdp_on_cpu()
    else:
        _start_deepspeed_on_cpu()


def sharding_arguments(config: TrainingConfig) -> dict[str, object]:
    """Fields of transformers' TrainingArguments that divide the training state; none without it.

    Raises:
        RecipeError: the DeepSpeed file cannot be read, or says what the recipe says.
    """
    import torch

    sharding = config.launch.sharding
    if sharding is None:
        return {}
    if not sharding.fsdp:
        return {"deepspeed": deepspeed_config(sharding)}
    recompute = config.extra_args.get("gradient_checkpointing", torch.cuda.is_available())
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            # Every process writes its part of a checkpoint; `complete_weights` joins them once.
            "state_dict_type": "SHARDED_STATE_DICT",
            "activation_checkpointing": bool(recompute),
        },
        # FSDP's own recomputation gathers the parameters once a backward pass, the model's twice.
        "gradient_checkpointing": False,
    }


def deepspeed_config(sharding: Sharding) -> JsonObject:
    """DeepSpeed's configuration, from the recipe's keys or from the file that it names.

    https://www.deepspeed.ai/docs/config-json/ describes its keys; `auto` is filled in by
    transformers from what the recipe says.

    Raises:
        RecipeError: the file cannot be read, or says what the recipe says.
    """
    problems = config_problems(sharding, "launch.sharding")
    if problems:
        raise RecipeError(problems)
    own = _zero(sharding) if sharding.config is None else _read(Path(sharding.config))
    merged = _merge(_FROM_TRAINER, own)
    zero = merged["zero_optimization"]
    assert isinstance(zero, dict), "config_problems has looked"
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return merged


def config_problems(sharding: Sharding, where: str) -> list[Problem]:
    """What is wrong with the DeepSpeed file that a recipe names; an empty list means nothing.

    Args:
        sharding: As the recipe has it.
        where: Its key in the recipe, such as `stages[2].sft.launch.sharding`.
    """
    if sharding.config is None:
        return []
    key = f"{where}.config"
    try:
        config = _read(Path(sharding.config))
    except (OSError, ValueError) as error:
        return [Problem(key, f"{sharding.config} cannot be read as JSON: {error}")]
    problems = []
    for name, recipe_key in _SAID_BY_RECIPE.items():
        if _at(config, name) not in (None, "auto"):
            message = f"{sharding.config} sets `{name}`, which the recipe says"
            problems.append(Problem(key, message, f"remove it and write `{recipe_key}`"))
    for name, reason in _OURS.items():
        if _at(config, name) not in (None, _at(_FROM_TRAINER, name) in (None, True)):
            message = f"{sharding.config} sets `{name}`, and posttrain sets it itself: {reason}"
            problems.append(Problem(key, message, "remove it"))
    if _at(config, "zero_optimization.stage") not in (1, 2, 3):
        message = f"{sharding.config} has no `zero_optimization.stage` of 1, 2 or 3"
        problems.append(Problem(key, message, "start from configs/deepspeed/zero2.json"))
    return problems


def keep_outputs_precise(trainer: Trainer) -> None:
    """Let a divided model return its loss, and join its gradients, in float32. Call it once.

    accelerate's default under FSDP rounds both to the precision of the computation: a loss of 6.402
    became 6.390 in bfloat16.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.mixed_precision_policy is None:
        return
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
    )


def remember_division(trainer: Trainer, checkpoint: Path) -> None:
    """Note in a checkpoint how the training state in it is divided."""
    division = _division(trainer)
    if division and trainer.args.process_index == 0:
        (checkpoint / _DIVISION).write_text(division, encoding="utf-8")


def check_division(trainer: Trainer, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint that is divided in another way.

    DeepSpeed would end with an error that names no remedy; transformers would load the weights and
    start with a new optimizer, silently.

    Raises:
        UsageError: with the settings that the run was begun with.
    """
    note, now = checkpoint / _DIVISION, _division(trainer)
    begun = note.read_text(encoding="utf-8") if note.exists() else ""
    if begun != now:
        raise UsageError(
            f"{checkpoint} was written with {begun or 'no sharding'}, and this run has "
            f"{now or 'no sharding'}: set `launch` as it was, or remove the folder "
            f"{checkpoint.parent} to start again"
        )


def divide_untrained(trainer: Trainer) -> None:
    """Divide a model that will not be trained any more, so that a checkpoint can be loaded into it.

    Training does it by itself; without sharding a checkpoint loads into the plain model.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        loader = trainer.get_train_dataloader()
        trainer._prepare_for_training(trainer.args.max_steps, loader, resume_from_checkpoint=None)


def loading_dtype(config: TrainingConfig, dtype: ResolvedDType) -> ResolvedDType:
    """The precision in which a stage loads the base's weights.

    Those that are trained are kept in float32, and computed with in `dtype`. DeepSpeed keeps them
    so itself, beside the ones in 16 bits that it computes with.
    """
    trains_all = config.adapter is None
    return "float32" if trains_all and not _by_deepspeed(config.launch.sharding) else dtype


def adapters_in_float32(config: TrainingConfig, dtype: ResolvedDType) -> bool:
    """Whether an adapter's own weights are in float32 whatever the base has.

    DeepSpeed wants one precision for all, and keeps a copy of what is trained in float32 itself.
    """
    return dtype == "float32" or not _by_deepspeed(config.launch.sharding)


def complete_weights(trainer: Trainer, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """All weights of the trained model, gathered from the processes: all must call it.

    Hand it to `outputs.save_model`: under ZeRO-3 and FSDP2 the model's own parameters are empty or
    hold a part each.

    Args:
        trainer: Whose training has ended.
        dtype: Of the parameters returned; buffers stay as they are.

    Returns:
        On rank 0 every tensor in CPU memory, whole, by the names of the model without wrappers.
        None on the other processes, and where every process has all weights anyway.
    """
    if trainer.is_deepspeed_enabled:
        if trainer.accelerator.state.deepspeed_plugin.zero_stage != 3:
            return None
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    elif trainer.is_fsdp_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model)
    else:
        return None
    if trainer.args.process_index != 0:
        return None
    # Tied weights are one tensor until they are divided, and would be stored twice.
    tied = getattr(trainer.model, "all_tied_weights_keys", None) or {}
    parameters = {name for name, _ in trainer.model.named_parameters()}
    return {
        name: value.to(dtype) if name in parameters else value
        for name, value in weights.items()
        if name not in tied
    }


def join_adapter(trainer: Trainer) -> None:
    """Make each trained weight of an adapter whole on every process: all must call it.

    Only FSDP needs it, and the model cannot be trained any further. Under ZeRO-3
    `outputs.save_adapter` gathers what it writes.
    """
    if not trainer.is_fsdp_enabled:
        return
    import torch
    from torch.distributed.tensor import DTensor

    for module in trainer.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and isinstance(parameter, DTensor):
                whole = torch.nn.Parameter(parameter.detach().full_tensor().cpu())
                module.register_parameter(name, whole)


def _division(trainer: Trainer) -> str:
    """Such as `zero: 3 on 2 processes`; empty where every process has all of the state."""
    processes = trainer.accelerator.num_processes
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        return f"`zero: {stage}` on {processes} processes"
    return f"`fsdp: true` on {processes} processes" if trainer.is_fsdp_enabled else ""


def _by_deepspeed(sharding: Sharding | None) -> bool:
    return sharding is not None and not sharding.fsdp


def _start_deepspeed_on_cpu() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    # Its shared memory kernel would be compiled now, in half a minute and by a compiler that may
    # not be there. gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def _accept_fsdp_on_cpu() -> None:
    """Let accelerate use FSDP on CPU processes, as it does on every other device."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def with_fsdp(state: AcceleratorState, *args: object, **kwargs: object) -> None:
        original(state, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            if state._mixed_precision != "no":
                plugin.set_mixed_precision(state._mixed_precision)  # type: ignore[attr-defined]
            state.fsdp_plugin = plugin
            # Every later AcceleratorState takes the type from here.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def _zero(sharding: Sharding) -> JsonObject:
    zero: JsonObject = {
        "stage": sharding.zero,
        "overlap_comm": True,
        "contiguous_gradients": True,
    }
    if sharding.offload is not None:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if sharding.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {"zero_optimization": zero}


def _read(path: Path) -> JsonObject:
    config = json.loads(path.read_bytes())
    if not isinstance(config, dict):
        raise ValueError("it holds no JSON object")
    return config


def _merge(base: Mapping[str, JsonValue], own: Mapping[str, JsonValue]) -> JsonObject:
    """`own` over `base`, at any depth."""
    merged = deepcopy(dict(base))
    for key, value in own.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = _merge(below, value)
        else:
            merged[key] = deepcopy(value)
    return merged


def _at(config: Mapping[str, JsonValue], dotted: str) -> JsonValue:
    """The value at `a.b`, or None."""
    value: JsonValue = dict(config)
    for key in dotted.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value
