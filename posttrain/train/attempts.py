"""How every training program begins: its libraries, its attempts, its arguments and its model.

What it learns from and what it leaves is each program's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from posttrain.data.rows import Row
from posttrain.hardware import resolve_dtype
from posttrain.recipe.training import TrainingConfig
from posttrain.stages.program import StageContext, StageResult
from posttrain.train.adapters import Trainable, check_trainable, count_trainable
from posttrain.train.arguments import Schedule, training_arguments
from posttrain.train.checkpoints import newest_complete, remove_incomplete
from posttrain.train.processes import leave_process_group, prepare_libraries
from posttrain.train.resources import Resources
from posttrain.train.rows import rows_of_step
from posttrain.train.sharding import prepare_sharding
from posttrain.train.tables import TrainingTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments

Config = TypeVar("Config", bound=TrainingConfig)


@dataclass(frozen=True)
class Start:
    """What a trainer is made of."""

    args: TrainingArguments
    model: PreTrainedModel
    trainable: Trainable


@contextmanager
def training_process(config: TrainingConfig) -> Iterator[None]:
    """Libraries and sharding around a program's work, and an orderly end of its process group."""
    sharding = config.launch.sharding
    prepare_libraries(deepspeed=sharding is not None and not sharding.fsdp)
    try:
        prepare_sharding(sharding)
        yield
    finally:
        leave_process_group()


def train_as_fits(
    context: StageContext[Config],
    resources: Resources,
    attempt: Callable[[int], StageResult | None],
) -> StageResult | None:
    """Train with passes that fit into memory; leaves `resources.json`.

    Args:
        context: The stage.
        resources: Watches over the attempts.
        attempt: Trains with so many rows a pass, and leaves the output.

    Returns:
        The result, on rank 0.
    """
    from posttrain.train.probe import within_memory

    if context.rank == 0:
        remove_incomplete(context.checkpoints)

    def watched(micro_batch_size: int) -> StageResult | None:
        resources.micro_batch_size = micro_batch_size
        return attempt(micro_batch_size)

    result = within_memory(context, watched)
    return None if result is None else resources.leave(context.output, result)


def begin(
    context: StageContext[Config],
    schedule: Schedule,
    method: Mapping[str, object],
    load: Callable[[StageContext[Config], int], PreTrainedModel],
) -> Start:
    """Arguments, and then the model: the arguments give each process its device.

    Args:
        context: The stage.
        schedule: Its steps.
        method: Fields of the method's own, by TRL's names.
        load: Loads what is trained, for so many optimizer steps.
    """
    config = context.config
    args = training_arguments(
        config,
        schedule,
        context.checkpoints,
        resolve_dtype(config.dtype),
        resumed=newest_complete(context.checkpoints) is not None,
        method=method,
    )
    say(context, "loading the model")
    model = load(context, schedule.steps)
    trainable = count_trainable(model)
    check_trainable(trainable, adapter=config.adapter is not None)
    say(context, f"ready: {trainable}")
    return Start(args, model, trainable)


def describe_step(
    trainer: Trainer, table: TrainingTable, rows: Sequence[Row], batch_size: int, step: int
) -> str:
    """The rows that an optimizer step read, as `FILE:ROW, ...`."""
    read = rows_of_step(trainer.get_train_dataloader(), table, batch_size, step)
    return ", ".join(f"{rows[row].file}:{rows[row].row}" for row in read)


def say(context: StageContext[Config], message: str) -> None:
    """Report a phase, from one process."""
    if context.rank == 0:
        context.events.phase(message)
