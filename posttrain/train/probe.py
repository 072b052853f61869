"""Running out of memory: found before the first step, and survived.

Before the first step the pass with the most tokens is computed once, forward and backward, and
forgotten again. A pass that does not fit is halved: the same rows make an optimizer step in twice
as many passes, and what is learned is the same but for the order of sums and of dropout's draws.

Importing this module imports transformers: do it inside functions.
"""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.errors import ModelError
from posttrain.recipe.training import TrainingConfig
from posttrain.stages.program import StageContext
from posttrain.train.adapters import can_recompute_activations
from posttrain.train.processes import any_process, world_size
from posttrain.train.tables import TrainingTable

Config = TypeVar("Config", bound=TrainingConfig)
Result = TypeVar("Result")


class PassTooLarge(Exception):
    """A pass does not fit into some process's memory; every process raises it at the same point."""


def within_memory(context: StageContext[Config], attempt: Callable[[int], Result]) -> Result:
    """Train with passes as large as the recipe says or, out of memory, as fit.

    Each attempt goes on from the newest complete checkpoint, or from the start.

    Args:
        context: The stage.
        attempt: Loads the model and trains, given rows a pass.

    Returns:
        What the attempt that fitted returned.

    Raises:
        ModelError: not even one row a pass fits, or one of several processes ran out of memory in
            the middle of training, where the others cannot know of it.
    """
    config: TrainingConfig = context.config
    micro = config.micro_batch_size
    while True:
        try:
            return attempt(micro)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            agreed = isinstance(error, PassTooLarge) or world_size() == 1
            reason = str(error).splitlines()[0]
        # Only here, behind the handler, nothing holds on to the model any more.
        gc.collect()
        clear_device_cache()
        if not agreed or micro == 1:
            raise ModelError(_what_to_write(config, micro, reason))
        smaller = max(size for size in range(1, micro // 2 + 1) if micro % size == 0)
        if context.rank == 0:
            accumulation = config.batching.batch_size // world_size() // smaller
            context.events.warning(
                f"out of memory with {micro} rows a pass; going on with {smaller}, and "
                f"{accumulation} passes an optimizer step: a step reads as many rows as before"
            )
        micro = smaller


class ProbeMemory(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Computes the pass with the most tokens before the first step, and leaves no trace of it.

    DeepSpeed and FSDP count passes and move parameters while they compute, so that a pass cannot be
    taken back: there the first steps themselves are the probe.
    """

    def __init__(
        self,
        trainer: Trainer,
        table: TrainingTable,
        loss: Callable[[torch.nn.Module, dict[str, Any]], torch.Tensor] | None = None,
    ) -> None:
        """Try the widest rows of `table` before the first step.

        Args:
            trainer: The trainer.
            table: What it reads.
            loss: Loss of a batch under a model, with no trace left in the trainer's numbers and
                without waiting for other processes. Default: that of next-token prediction.
        """
        self._trainer = trainer
        self._table = table
        self._loss = loss or _next_token_loss

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **_others: object,
    ) -> None:
        """Try the largest pass, with room taken for the optimizer's states.

        Raises:
            PassTooLarge: some process ran out of memory.
        """
        if self._trainer.is_deepspeed_enabled or self._trainer.is_fsdp_enabled:
            return
        failed = False
        with _generators_as_before(args.device):
            try:
                states = _future_states(self._trainer.model, optimizer)
                # The second pass of a step meets the gradients of the first.
                for _ in range(min(2, args.gradient_accumulation_steps)):
                    self._compute(args.per_device_train_batch_size)
                del states
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                failed = True
            self._trainer.model.zero_grad(set_to_none=True)
        if any_process(failed, args.device):
            raise PassTooLarge("the pass with the most tokens does not fit")

    def _compute(self, rows: int) -> None:
        """One forward and backward pass over the widest rows."""
        trainer, columns = self._trainer, self._table.dataset
        model = trainer.model_wrapped
        model.train()
        batch = trainer.data_collator([columns[entry] for entry in self._table.longest[:rows]])
        inputs: dict[str, Any] = trainer._prepare_inputs(batch)
        # Without synchronization: processes need not agree yet, and nothing is to be averaged.
        with trainer.accelerator.no_sync(model), trainer.compute_loss_context_manager():
            trainer.accelerator.backward(self._loss(model, inputs))


def _next_token_loss(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    loss: torch.Tensor = model(**inputs, use_cache=False, fused_lm_head=True).loss
    return loss


@contextmanager
def _generators_as_before(device: torch.device) -> Iterator[None]:
    """Give torch's generators back the state that they had: dropout drew from them."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _future_states(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> list[torch.Tensor]:
    """As much memory as AdamW will take at its first step; none if it has its states already."""
    if optimizer is None or optimizer.state:
        return []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [torch.zeros(2, *p.shape, dtype=torch.float32, device=p.device) for p in trained]


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | PassTooLarge) or should_reduce_batch_size(error):
        return True
    # Mapping a file fails with the system's own words, from Python and from Rust alike.
    return os.strerror(errno.ENOMEM) in str(error)


def _what_to_write(config: TrainingConfig, micro: int, reason: str) -> str:
    """The error for a run that cannot go on, with what needs less memory, first things first."""
    advice = []
    if micro > 1:
        advice.append(f"`batching: {{micro_batch_size: {micro // 2}}}`")
    recomputed = config.extra_args.get("gradient_checkpointing", torch.cuda.is_available())
    if not recomputed and can_recompute_activations(config.adapter):
        advice.append("`extra_args: {gradient_checkpointing: true}`")
    advice.append(f"`batching: {{max_length: {config.batching.max_length // 2}}}`")
    if config.adapter is None:
        advice.append("`adapter: {type: lora}`")
    if config.quantization is None:
        advice.append("`quantization: {type: nf4}` with an adapter")
    rows = "1 row" if micro == 1 else f"{micro} rows"
    return (
        f"out of memory with {rows} a pass ({reason}); write one of {', '.join(advice)}. "
        "`posttrain plan` shows what each needs"
    )
