"""Next-token training, the program behind `pretrain` and `sft`: they differ in their rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from posttrain.data.prepared import PreparedDataset
from posttrain.data.rows import Row
from posttrain.errors import DataError, ModelError
from posttrain.estimate.architecture import read_architecture
from posttrain.estimate.speed import model_flops_utilization
from posttrain.hardware import resolve_dtype
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.recipe.training import TrainingConfig
from posttrain.stages.program import StageContext, StageResult
from posttrain.train.arguments import plan_schedule
from posttrain.train.attempts import begin, describe_step, say, train_as_fits, training_process
from posttrain.train.checkpoints import newest_complete
from posttrain.train.held_out import HELD_OUT_ROWS, HeldOut
from posttrain.train.loss_page import LOSS_PAGE, write_loss_page
from posttrain.train.processes import world_size
from posttrain.train.resources import Resources
from posttrain.train.rows import (
    ROW_ACCOUNT,
    Encodings,
    count_passes,
    encode_rows,
    write_row_account,
)
from posttrain.train.run import run_to_end, training_result, write_training_record
from posttrain.train.sharding import (
    adapters_in_float32,
    complete_weights,
    join_adapter,
    keep_outputs_precise,
    loading_dtype,
)
from posttrain.train.tables import TrainingTable, held_out_table, make_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from posttrain.train.callbacks import ReportProgress
    from posttrain.train.history import History
    from posttrain.train.trainer import TokenWeightedTrainer

Config = TypeVar("Config", bound=TrainingConfig)

_FORMATS = {
    "chats": "prompt_completion, alpaca, messages and sharegpt",
    "documents": "text",
}
"""Formats that give rows of a family."""


@dataclass(frozen=True)
class TrainingData:
    """The rows of both sides, as the trainer reads them."""

    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    """The training side of the dataset, all of it."""
    encodings: Encodings
    table: TrainingTable
    held_out: HeldOut


def train(context: StageContext[Config]) -> StageResult | None:
    """Train on the dataset; leave an adapter, or a full model, and its accounts.

    `training.json` has every loss, `rows.parquet` every training row, `held_out.parquet` the loss
    of every held-out row.

    Inputs: `model`, a model folder, and `dataset`, a prepared dataset. Under torchrun every process
    runs this; rank 0 writes the output and returns the result.

    Raises:
        DataError: the dataset has rows of another kind, or none that can be trained on.
        ModelError: the model has no chat template, or a loss is not a number.
        RecipeError: `batching` or `extra_args` cannot work.
    """
    with training_process(context.config):
        return _train(context)


def _train(context: StageContext[Config]) -> StageResult | None:
    data = _read(context)

    def attempt(micro_batch_size: int) -> StageResult | None:
        trainer, report = _make_trainer(context, data, micro_batch_size)
        say(context, "training")
        history = run_to_end(trainer, newest_complete(context.checkpoints))
        save_weights(context, trainer, data.tokenizer)
        if context.rank != 0:
            return None
        return _leave_output(context, data, trainer, history, report)

    return train_as_fits(context, Resources.watch(context, data.table), attempt)


def _read(context: StageContext[Config]) -> TrainingData:
    """Read and tokenize the rows of both sides."""
    config = context.config
    prepared = PreparedDataset.open(Path(context.input("dataset").path))
    if prepared.family != config.family:
        raise DataError(
            f"{config.dataset}: {config.stage} needs {config.family} and these rows are "
            f"{prepared.family}; formats that give {config.family}: {_FORMATS[config.family]}"
        )
    say(context, "tokenizing")
    tokenizer = load_tokenizer(context.input("model"))
    batching, filler = config.batching, tokenizer.pad_token_id
    rows = prepared.train()
    encodings = _encode(context, tokenizer, rows, "training")
    table = make_table(
        encodings.every, batching.max_length, batching.packing, batching.batch_size, filler
    )
    return TrainingData(
        tokenizer, rows, encodings, table, _read_held_out(context, prepared, tokenizer)
    )


def _read_held_out(
    context: StageContext[Config], prepared: PreparedDataset, tokenizer: PreTrainedTokenizerBase
) -> HeldOut:
    groups = held_out_rows(prepared, context.config.dataset, context.config.validation.max_rows)
    every = [row for group in groups.values() for row in group]
    encoded = _encode(context, tokenizer, every, "held-out").every
    bounds = iter(encoded)
    table, tasks = held_out_table(
        [[next(bounds) for _ in group] for group in groups.values()],
        context.config.batching.max_length,
        context.config.micro_batch_size * world_size(),
        tokenizer.pad_token_id,
    )
    return HeldOut(every, table, tuple(groups), tasks)


def held_out_rows(prepared: PreparedDataset, dataset: str, max_rows: int) -> dict[str, list[Row]]:
    """The first rows of the validation side; of a mix, the first of each of its datasets.

    Args:
        prepared: The dataset.
        dataset: Its name, under which the rows of one that is no mix are returned.
        max_rows: Most rows of each.

    Returns:
        Rows by the name of their dataset, in the order of the names.
    """
    rows = prepared.validation()
    origins = prepared.origins("validation") or [dataset] * len(rows)
    chosen: dict[str, list[Row]] = {}
    for row, origin in zip(rows, origins, strict=True):
        task = chosen.setdefault(origin, [])
        if len(task) < max_rows:
            task.append(row)
    return {task: chosen[task] for task in sorted(chosen)}


def _encode(
    context: StageContext[Config],
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    side: str,
) -> Encodings:
    encodings = encode_rows(tokenizer, rows, context.config.batching.max_length)
    if not encodings.rows:
        raise DataError(f"{context.config.dataset}: no {side} row has a token to train on")
    if encodings.untrainable and context.rank == 0:
        context.events.warning(
            f"{encodings.untrainable} {side} rows have no token to train on and are left out"
        )
    return encodings


def _make_trainer(
    context: StageContext[Config], data: TrainingData, micro_batch_size: int
) -> tuple[TokenWeightedTrainer, ReportProgress]:
    """A trainer that is ready to start, or to go on from the newest checkpoint."""
    from posttrain.train.adapters import adapter_callbacks
    from posttrain.train.callbacks import ReportProgress, training_callbacks
    from posttrain.train.probe import ProbeMemory
    from posttrain.train.trainer import TokenWeightedTrainer

    config = context.config
    schedule = plan_schedule(config, len(data.table), world_size(), micro_batch_size)
    # Rows come tokenized and in their final length.
    method: dict[str, object] = {
        "max_length": None,
        "padding_free": config.padding_free,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    start = begin(context, schedule, method, load_model)
    report = ReportProgress(
        context.events,
        config.launch.log_every_steps,
        utilization(context, _lengths(data.table), start.trainable.count),
    )

    def describe_rows(step: int) -> str:
        return describe_step(trainer, data.table, data.rows, config.batching.batch_size, step)

    callbacks = training_callbacks(config.validation, report, context.events, describe_rows)
    trainer = TokenWeightedTrainer(
        model=start.model,
        args=start.args,
        processing_class=data.tokenizer,
        train_dataset=data.table.dataset,
        held_out=data.held_out,
        callbacks=[*callbacks, *adapter_callbacks(start.model, config.adapter)],
    )
    keep_outputs_precise(trainer)
    trainer.add_callback(ProbeMemory(trainer, data.table))
    return trainer, report


def utilization(
    context: StageContext[Config], lengths: np.ndarray, trainable: int
) -> Callable[[float], float | None]:
    """From tokens a second to the share of the hardware's peak that training reaches.

    Args:
        context: The stage.
        lengths: Tokens of each sequence.
        trainable: Trained parameters.
    """
    try:
        sizes = read_architecture(Path(context.input("model").path))
    except ModelError:
        return lambda _: None
    # A token costs attention by the length of its row: long rows count by their tokens.
    length = float((lengths**2).sum() / lengths.sum())
    dtype, processes = resolve_dtype(context.config.dtype), world_size()
    return lambda speed: model_flops_utilization(speed, sizes, trainable, length, dtype, processes)


def _lengths(table: TrainingTable) -> np.ndarray:
    return np.array([length for entry in table.dataset["seq_lengths"] for length in entry])


def load_model(context: StageContext[Config], steps: int) -> PreTrainedModel:
    """The weights to train: an adapter on a frozen base, or all of them in float32.

    Mixed precision keeps trained weights in float32 and computes in 16 bits: in bfloat16 itself
    small updates of a weight would be rounded away.
    """
    from transformers import set_seed

    from posttrain.train.adapters import add_adapter
    from posttrain.train.attention import separate_rows
    from posttrain.train.quantization import load_quantized

    config, base = context.config, context.input("model")
    if base.kind == "adapter":
        raise ModelError(
            f"{config.stage} starts from complete weights; put a `merge` stage before it"
        )
    set_seed(config.seed)
    dtype = resolve_dtype(config.dtype)
    if config.quantization is not None:
        model = load_quantized(base, config.quantization, dtype)
    else:
        model = load_causal_lm(base, loading_dtype(config, dtype))
    if config.padding_free:
        separate_rows(model)
    if config.adapter is None:
        return model
    return add_adapter(model, config.adapter, steps, adapters_in_float32(config, dtype))


def _leave_output(
    context: StageContext[Config],
    data: TrainingData,
    trainer: TokenWeightedTrainer,
    history: History,
    report: ReportProgress,
) -> StageResult:
    from posttrain.train.adapters import count_trainable

    config, best = context.config, history.best.step
    trainable = count_trainable(trainer.model)
    write_training_record(history, trainable, context.output)
    passes = count_passes(
        trainer.get_train_dataloader(),
        data.table,
        config.batching.batch_size,
        history.steps,
        last=best,
    )
    write_row_account(context.output / ROW_ACCOUNT, data.rows, data.encodings, data.table, passes)
    data.held_out.write_account(context.checkpoints, best, context.output / HELD_OUT_ROWS)
    if history.best.loss >= history.before:
        context.events.warning("the held-out loss did not fall; training made the model no better")
    result = training_result(history, trainable, report.tokens_per_second, config.family)
    write_loss_page(history, f"{context.job.name}: {result.headline}", context.output / LOSS_PAGE)
    return result


def save_weights(
    context: StageContext[Config], trainer: Trainer, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the weights, by rank 0; with sharding every process has a part of them to give."""
    from posttrain.train.outputs import cast_weights, save_adapter, save_model, stored_dtype

    say(context, "saving")
    base, model, writes = context.input("model"), trainer.model, context.rank == 0
    if context.config.adapter is not None:
        join_adapter(trainer)
        save_adapter(model, tokenizer, context.output, base_digest=base.digest, writes=writes)
        return
    dtype = stored_dtype(base.path)
    weights = complete_weights(trainer, dtype)
    if writes:
        cast_weights(model, dtype)
        save_model(model, tokenizer, context.output, weights)
