"""One training stage of a recipe: memory, time, and what to change if it does not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from posttrain.estimate.architecture import Architecture
from posttrain.estimate.beside import asks_reference, bytes_beside
from posttrain.estimate.device import Device
from posttrain.estimate.memory import MemoryEstimate, Training, estimate_memory
from posttrain.estimate.rows import Layout, RowLengths, lay_out
from posttrain.estimate.speed import hardware_flops_per_token, peak_flops, utilisation
from posttrain.estimate.trainable import trainable_parameters
from posttrain.hardware import resolve_dtype
from posttrain.recipe.adapters import LoraConfig, PrefixTuningConfig, Quantization
from posttrain.recipe.grpo import GroupConfig
from posttrain.recipe.online import OnlineConfig
from posttrain.recipe.training import Sharding, TrainingConfig
from posttrain.train.arguments import plan_schedule

REFERENCE_TIME = 4 / 3
"""A forward pass of the reference beside a forward and a backward pass, which is twice as long."""


@dataclass(frozen=True)
class Change:
    """Something to write in the recipe, and what it would do."""

    write: str
    """The change, as the recipe has it."""
    memory: MemoryEstimate
    fits: bool


@dataclass(frozen=True)
class StageEstimate:
    """What a training stage will need."""

    memory: MemoryEstimate
    device: Device
    fits: bool
    trainable: int
    """Parameters that get a gradient."""
    parameters: int
    """Of the base model."""
    steps: int | None
    """Optimizer steps, unless it stops early; None where neither rows nor recipe tell."""
    tokens: int | None
    """Tokens that all these steps read."""
    seconds: float | None
    """Of the steps alone; None where the hardware's speed is unknown."""
    utilisation: float
    """Share of the hardware's peak that `seconds` assumes."""
    basis: str
    """What the rows' lengths were taken from."""
    advice: tuple[Change, ...]
    """What to change if it does not fit, first things first; empty if it does."""


def estimate_stage(
    sizes: Architecture, config: TrainingConfig, lengths: RowLengths, device: Device
) -> StageEstimate:
    """Estimate a training stage on a device.

    Args:
        sizes: The model that is trained.
        config: The stage.
        lengths: Of its training rows.
        device: Where it runs.
    """
    layout = lay_out_stage(config, lengths)
    training = training_of(config, layout, device)
    memory = _memory(sizes, config, training)
    processes = config.launch.num_processes
    fits = memory.fits(device, processes)
    trainable = trainable_parameters(sizes, config.adapter)
    schedule = plan_schedule(config, layout.entries, config.launch.world_size)
    known = lengths.counted or config.max_steps is not None
    # How fast answers are written is another matter, and not estimated.
    timed = known and not isinstance(config, OnlineConfig)
    tokens = round(schedule.steps * config.batching.batch_size * layout.tokens / layout.entries)
    seconds = _seconds(sizes, training, trainable, layout.mean_length, tokens, device)
    if seconds is not None and asks_reference(config):
        seconds *= REFERENCE_TIME
    return StageEstimate(
        memory=memory,
        device=device,
        fits=fits,
        trainable=trainable,
        parameters=sizes.parameters,
        steps=schedule.steps if known else None,
        tokens=tokens if known else None,
        seconds=seconds if timed else None,
        utilisation=utilisation(device),
        basis=lengths.basis,
        advice=() if fits else tuple(_changes(sizes, config, lengths, device)),
    )


def lay_out_stage(
    config: TrainingConfig, lengths: RowLengths, micro_batch_size: int | None = None
) -> Layout:
    """The rows as this stage's trainer reads them."""
    batching, sequences = config.batching, config.sequences_a_row
    longest = batching.max_length
    if isinstance(config, OnlineConfig):
        lengths, longest = _with_answers(config, lengths)
    layout = lay_out(
        lengths,
        longest,
        batching.packing,
        (micro_batch_size or config.micro_batch_size) * sequences,
        flat=config.padding_free,
        cut=config.family != "documents",
    )
    return replace(layout, entries=math.ceil(layout.entries / sequences))


def _with_answers(config: OnlineConfig, lengths: RowLengths) -> tuple[RowLengths, int]:
    """Prompts as long as they may be, each with as many answers as are written, and the longest."""
    rollout = config.rollout
    prompts = np.minimum(lengths.tokens, rollout.max_prompt_tokens)
    answers = config.answers if isinstance(config, GroupConfig) else 1
    tokens = np.repeat(prompts + rollout.max_new_tokens, answers)
    return replace(lengths, tokens=tokens), rollout.max_prompt_tokens + rollout.max_new_tokens


def _memory(sizes: Architecture, config: TrainingConfig, training: Training) -> MemoryEstimate:
    """Of the model that is trained and of those beside it."""
    estimate = estimate_memory(sizes, training)
    return replace(estimate, beside=bytes_beside(sizes, config, training))


def training_of(
    config: TrainingConfig, layout: Layout, device: Device, micro_batch_size: int | None = None
) -> Training:
    """The stage as one device sees it.

    Args:
        config: The stage.
        layout: Its rows.
        device: Where it runs.
        micro_batch_size: Instead of the stage's own, where that needs too much memory.
    """
    cuda = device.kind == "cuda"
    per_process = config.batching.batch_size // config.launch.world_size
    return Training(
        adapter=config.adapter,
        quantization=config.quantization,
        dtype=resolve_dtype(config.dtype),
        batch=layout.widest,
        accumulation=per_process // (micro_batch_size or config.micro_batch_size),
        checkpointing=_recomputes(config, cuda),
        cuda=cuda,
        varlen_kernel=cuda and find_spec("flash_attn") is not None,
        world_size=config.launch.world_size,
        sharding=_plain(config.launch.sharding),
    )


def _recomputes(config: TrainingConfig, cuda: bool) -> bool:
    """Whether activations are recomputed: on CUDA by default, never with a prefix."""
    if isinstance(config.adapter, PrefixTuningConfig):
        return False
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if name in config.extra_args:
            return bool(config.extra_args[name])
    return cuda


def _plain(sharding: Sharding | None) -> Sharding | None:
    """A DeepSpeed file as the keys that it amounts to; what it cannot be read for is ZeRO-2."""
    if sharding is None or sharding.config is None:
        return sharding
    try:
        zero = json.loads(Path(sharding.config).read_bytes())["zero_optimization"]
        stage = zero["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return Sharding(zero=2)
    parameters = zero.get("offload_param", {}).get("device", "none") != "none"
    states = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    offload = "all" if parameters and stage == 3 else "optimizer" if states else None
    return Sharding(zero=stage, offload=offload)


def _seconds(
    sizes: Architecture,
    training: Training,
    trainable: int,
    length: float,
    tokens: int,
    device: Device,
) -> float | None:
    """Time of the steps: operations over what the hardware is assumed to reach."""
    # A CPU that computes in 16 bits is at least as fast at it as in 32.
    peak = peak_flops(training.dtype if training.cuda else "float32", device)
    if peak is None:
        return None
    devices = training.world_size if training.cuda else 1
    needed = hardware_flops_per_token(sizes, trainable, length, training.checkpointing)
    return tokens * needed / (peak * utilisation(device) * devices)


def _changes(
    sizes: Architecture, config: TrainingConfig, lengths: RowLengths, device: Device
) -> Iterator[Change]:
    """What needs less memory, each by itself and then together with the one before it.

    First what leaves the result as it is (a smaller micro-batch, recomputed activations), then what
    changes what is learned from (shorter rows), then other methods, then more machinery.
    """
    best = training_of(config, lay_out_stage(config, lengths), device)
    least = _memory(sizes, config, best).total
    for write, training in _variants(config, lengths, device):
        varied = config.model_copy(update={"adapter": training.adapter})
        memory = _memory(sizes, varied, training)
        if memory.total < 0.99 * least:
            least = memory.total
            yield Change(write, memory, memory.fits(device, config.launch.num_processes))


def _variants(
    config: TrainingConfig, lengths: RowLengths, device: Device
) -> Iterator[tuple[str, Training]]:
    """Each variant goes on from the one before: they are told as a list of further steps."""
    micro = config.micro_batch_size
    layout = lay_out_stage(config, lengths)
    while micro > 1:
        micro = max(
            size for size in range(1, micro // 2 + 1) if config.micro_batch_size % size == 0
        )
        layout = lay_out_stage(config, lengths, micro)
        yield f"batching: {{micro_batch_size: {micro}}}", training_of(config, layout, device, micro)
    training = training_of(config, layout, device, micro)
    if not training.checkpointing:
        training = replace(training, checkpointing=True)
        yield "extra_args: {gradient_checkpointing: true}", training
    half = config.batching.max_length // 2
    if layout.widest.longest > half >= 64:
        shorter = config.model_copy(
            update={"batching": config.batching.model_copy(update={"max_length": half})}
        )
        training = replace(training, batch=lay_out_stage(shorter, lengths, micro).widest)
        yield f"batching: {{max_length: {half}}}", training
    if config.adapter is None:
        training = replace(training, adapter=LoraConfig(), sharding=None)
        yield "adapter: {type: lora}", training
    if training.quantization is None:
        training = replace(training, quantization=Quantization(), sharding=None)
        yield "quantization: {type: nf4}", training
    yield from _sharded(training, config, device)


def _sharded(
    training: Training, config: TrainingConfig, device: Device
) -> Iterator[tuple[str, Training]]:
    """Full training divided over the GPUs, or with its states in the machine's memory."""
    if device.kind != "cuda" or config.adapter is not None:
        return
    processes = max(config.launch.world_size, device.count)
    divided = replace(training, adapter=None, quantization=None, world_size=processes)
    if processes > 1:
        zero = Sharding(zero=3)
        yield f"full: {{zero: 3}} on {processes} GPUs", replace(divided, sharding=zero)
    offloaded = Sharding(zero=3, offload="all")
    yield "full: {zero: 3, offload: all}", replace(divided, sharding=offloaded)
