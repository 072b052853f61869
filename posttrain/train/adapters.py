"""Adapters by peft, one function a method, and what of a model is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.errors import ModelError
from posttrain.recipe.adapters import (
    AdaLoraConfig,
    AdapterConfig,
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch.nn import Module, Parameter
    from transformers import PreTrainedModel, TrainerCallback

_PISSA = "pissa_niter_16"
"""PiSSA by the randomized decomposition that its authors recommend: seconds instead of hours."""


@dataclass(frozen=True)
class Trainable:
    """How many of a model's parameters are trained."""

    count: int
    total: int

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.count / self.total

    def __str__(self) -> str:
        """Such as `4,884,480 of 139,400,064 parameters (3.5%) are trained`."""
        percent = 100 * self.share
        share = f"{percent:.1f}%" if percent >= 1 else f"{percent:.2g}%"
        return f"{self.count:,} of {self.total:,} parameters ({share}) are trained"


def add_adapter(
    model: PreTrainedModel,
    config: AdapterConfig,
    total_steps: int,
    autocast_adapter_dtype: bool = True,
    head: str | None = None,
) -> PeftModel:
    """Freeze the model and put an adapter on it, ready to be trained.

    What is random in it is drawn from torch's global generator: seed it first. LoRA and AdaLoRA,
    IA3, VeRA and bottlenecks leave the model as it is until the first step. PiSSA moves the largest
    directions of the weights into the adapter: `outputs.save_adapter` moves them back.

    Args:
        model: A causal language model with its weights, quantized or not.
        config: The method and its settings.
        total_steps: Optimizer steps of the run; AdaLoRA plans its ranks by it.
        autocast_adapter_dtype: Hold the adapter's weights in float32 whatever the base has, as
            small updates need. False: in the base's precision. DeepSpeed's ZeRO-3 needs that of a
            16-bit base, because it gathers parameters into buffers of one dtype
            (huggingface/trl#6089).
        head: Name of a head of the model's own that is trained as it is, beside the adapter, and
            written with it.

    Raises:
        ModelError: a name in `target_modules` is no layer's, or the method does not go with this
            model.
    """
    if isinstance(config, BottleneckConfig):
        from posttrain.train.bottleneck import add_bottleneck

        adapted = add_bottleneck(model, config)
    else:
        adapted = _add_by_peft(model, config, total_steps, head)
    import torch

    dtype = torch.float32 if autocast_adapter_dtype else model.dtype
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


def adapter_callbacks(
    model: PreTrainedModel, config: AdapterConfig | None
) -> list[TrainerCallback]:
    """What must happen around the steps for the adapter's sake."""
    if not isinstance(config, AdaLoraConfig):
        return []
    from posttrain.train.adapter_training import AllocateRanks

    return [AllocateRanks(model)]


def can_recompute_activations(config: AdapterConfig | None) -> bool:
    """Whether gradient checkpointing works: not with a prefix, which is a cache of keys and values.

    Transformers drops the cache when it recomputes activations, and nothing would be trained.
    """
    return not isinstance(config, PrefixTuningConfig)


@contextmanager
def keep_dtypes(model: Module) -> Iterator[None]:
    """Give trained parameters back the precision, and the values, that they had before.

    For the construction of a TRL trainer, which turns an adapter on a 4-bit base into bfloat16.
    Updates below 1/256 of a weight would then be rounded away, and a CPU would compute in an
    emulated format; in float32 under autocast the adapter costs a few megabytes more.
    """
    kept = [
        (parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad
    ]
    yield
    for parameter, data in kept:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)


def count_trainable(model: Module) -> Trainable:
    """Parameters with a gradient, and all; those in 4 bits and those divided by ZeRO as a whole."""
    sizes = [(_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return Trainable(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


def check_trainable(trainable: Trainable, adapter: bool) -> None:
    """Refuse an adapter that trains everything or nothing.

    Raises:
        ModelError: the share of trained parameters is 0%, or 100% with an adapter.
    """
    if trainable.count == 0:
        raise ModelError("no parameter is trained; widen `adapter.target_modules`")
    if adapter and trainable.count == trainable.total:
        raise ModelError(
            "an adapter was asked for and yet all parameters would be trained; "
            "write `adapter: null` to train all weights on purpose"
        )


def _add_by_peft(
    model: PreTrainedModel, config: AdapterConfig, total_steps: int, head: str | None
) -> PeftModel:
    import peft

    _check_names(model, "target_modules", getattr(config, "target_modules", None))
    _check_names(model, "feedforward_modules", getattr(config, "feedforward_modules", None))
    try:
        settings = _peft_config(model, config, total_steps)
        if head is not None:
            settings.task_type, settings.modules_to_save = "SEQ_CLS", [head]
        adapted = peft.get_peft_model(model, settings)
        if isinstance(config, PrefixTuningConfig) and config.projection_size is None:
            _start_from_words(adapted, config.virtual_tokens)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"adapter: peft refuses it for this model: {error}") from error
    if isinstance(config, LoraConfig) and config.init == "pissa":
        # What the adapter starts from is no part of the base any more; saving needs it.
        adapted.initial_lora = {
            name: parameter.detach().clone()
            for name, parameter in adapted.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }
    return adapted


def _peft_config(model: PreTrainedModel, config: AdapterConfig, total_steps: int) -> PeftConfig:
    match config:
        case LoraConfig():
            return _lora(model, config)
        case AdaLoraConfig():
            return _adalora(config, total_steps)
        case Ia3Config():
            return _ia3(model, config)
        case VeraConfig():
            return _vera(config)
        case PrefixTuningConfig():
            return _prefix(config)
        case PromptTuningConfig():
            return _prompt(model, config)
        case _:
            raise ModelError(f"adapter: {type(config).__name__} is no known method")


def _lora(model: PreTrainedModel, config: LoraConfig) -> PeftConfig:
    import peft

    if config.init == "pissa" and getattr(model, "is_loaded_in_4bit", False):
        raise ModelError(
            "adapter.init: `pissa` takes the weights apart, which 4-bit ones cannot be; remove "
            "`init` or `quantization`"
        )
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=_whole(config.scale_alpha),
        lora_dropout=config.input_dropout,
        target_modules=_targets(config.target_modules),
        use_rslora=config.rank_stabilized,
        use_dora=config.dora,
        init_lora_weights=_PISSA if config.init == "pissa" else True,
    )


def _adalora(config: AdaLoraConfig, total_steps: int) -> PeftConfig:
    """Ranks shrink from the end of the run's first tenth to its middle, and then stay.

    The paper's runs have about these shares. The penalty on the singular vectors is left to
    `AllocateRanks`: peft would add it to the loss, and to the held-out loss, of each micro-batch.
    """
    import peft

    if config.rank >= config.initial_rank:
        raise ModelError(
            f"adapter.rank: {config.rank} is the mean rank at the end and must be below "
            f"`initial_rank`, which is {config.initial_rank}"
        )
    if total_steps < 2:
        raise ModelError(
            "adapter: adalora redistributes ranks between steps, and this run has one step; "
            "write `type: lora`, or train for longer"
        )
    return peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=config.initial_rank,
        target_r=config.rank,
        lora_alpha=_whole(config.alpha or 2.0 * config.initial_rank),
        lora_dropout=config.dropout,
        target_modules=_targets(config.target_modules),
        total_step=total_steps,
        tinit=total_steps // 10,
        # The importance of ranks is known one step before they are fixed for good.
        tfinal=total_steps // 2 if total_steps > 2 else 0,
        orth_reg_weight=0.0,
    )


def _ia3(model: PreTrainedModel, config: Ia3Config) -> PeftConfig:
    import peft

    from posttrain.train.adapter_targets import ia3_targets

    targets = ia3_targets(model, config.target_modules, config.feedforward_modules)
    return peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=list(targets.scaled),
        feedforward_modules=list(targets.feedforward),
    )


def _vera(config: VeraConfig) -> PeftConfig:
    """With the random matrices saved.

    They could be drawn again from their seed, but torch promises the same numbers for one release
    and platform only; an adapter must outlive both. They cost 3 MB with a 135M model and 23 MB
    with a 7B one.
    """
    import peft

    return peft.VeraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        vera_dropout=config.dropout,
        target_modules=_targets(config.target_modules),
        save_projection=True,
    )


def _prefix(config: PrefixTuningConfig) -> PeftConfig:
    import peft

    return peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.virtual_tokens,
        prefix_projection=config.projection_size is not None,
        encoder_hidden_size=config.projection_size,
    )


def _start_from_words(model: PeftModel, count: int) -> None:
    """Let the prefix be the keys and values of random words of the vocabulary.

    Li and Liang (2021, section 7.4) found it better than random numbers. On the 135M model these
    raise the loss from 3.6 to 9.1 nats, and words leave it at 3.3.
    """
    import torch
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
    from peft.utils.integrations import check_deepspeed_zero3_enabled

    if check_deepspeed_zero3_enabled():
        raise ModelError(
            "adapter: a prefix starts from keys and values of the whole model, which ZeRO-3 "
            "divides; write `zero: 2`, or give `projection_size`"
        )
    base = model.get_base_model()
    words = torch.randint(0, base.get_input_embeddings().num_embeddings, (1, count))
    with torch.no_grad():
        out = base(input_ids=words.to(base.device), use_cache=True)
    initialize_kv_prefix_from_past_key_values(model, past_key_values=out.past_key_values)


def _prompt(model: PreTrainedModel, config: PromptTuningConfig) -> PeftConfig:
    import peft

    text = config.init_text
    return peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.virtual_tokens,
        prompt_tuning_init="SAMPLE_VOCAB" if text is None else "TEXT",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=None if text is None else model.name_or_path,
    )


def _check_names(model: Module, key: str, names: tuple[str, ...] | str | None) -> None:
    """Refuse names that peft would pass over as long as another one matches."""
    if names is None or isinstance(names, str):
        return
    from posttrain.train.adapter_targets import layer_names

    modules = [name for name, _ in model.named_modules()]
    unknown = [
        name
        for name in names
        if not any(module == name or module.endswith(f".{name}") for module in modules)
    ]
    if unknown:
        raise ModelError(
            f"adapter.{key}: no layer of this model is called {' or '.join(unknown)}; its linear "
            f"layers are {', '.join(layer_names(model))}"
        )


def _targets(names: tuple[str, ...] | str) -> list[str] | str:
    return names if isinstance(names, str) else list(names)


def _whole(number: float) -> float:
    """An integer where it is one: tools other than peft expect that of `lora_alpha`."""
    return int(number) if number.is_integer() else number


def _size(parameter: Parameter) -> int:
    """Values of a parameter, wherever and however it holds them."""
    divided = getattr(parameter, "ds_numel", None)
    if divided is not None:
        return int(divided)
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else parameter.numel()
