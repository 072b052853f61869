"""`sft`: supervised fine-tuning by TRL, resumable, with the best checkpoint restored at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.prepared import PreparedDataset
from posttrain.data.rows import Row
from posttrain.errors import DataError, ModelError
from posttrain.hardware import resolve_dtype
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.recipe.sft import SftConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.train.arguments import plan_schedule, sft_arguments
from posttrain.train.checkpoints import newest_complete, remove_incomplete
from posttrain.train.lora import add_lora, check_trainable, count_trainable
from posttrain.train.processes import leave_process_group, prepare_libraries, world_size
from posttrain.train.rows import (
    ROW_ACCOUNT,
    Encodings,
    count_passes,
    encode_rows,
    to_table,
    write_row_account,
)
from posttrain.train.run import run_to_end, training_result, write_training_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def main(context: StageContext[SftConfig]) -> StageResult | None:
    """Train on the dataset's chats; leave an adapter, or a full model, and its accounts.

    `training.json` has every loss, `rows.parquet` every training row.

    Inputs: `model`, a model folder, and `dataset`, a prepared dataset of chats. Under torchrun
    every process runs this; rank 0 writes the output and returns the result.

    Raises:
        DataError: the dataset has no chats, or none that can be trained on.
        ModelError: the model has no chat template, or a loss is not a number.
        RecipeError: `batching` or `extra_args` cannot work.
    """
    prepare_libraries()
    try:
        return _train(context)
    finally:
        leave_process_group()


def _train(context: StageContext[SftConfig]) -> StageResult | None:
    from posttrain.train.callbacks import ReportProgress, training_callbacks
    from posttrain.train.trainer import TokenWeightedTrainer

    config = context.config
    tokenizer = load_tokenizer(context.input("model"))
    rows, train, held_out = _encode(context, tokenizer)
    schedule = plan_schedule(config, len(train.rows), world_size())
    if context.rank == 0:
        remove_incomplete(context.checkpoints)
    checkpoint = newest_complete(context.checkpoints)
    # The arguments come before the model: they give each process its device.
    args = sft_arguments(
        config, schedule, context.checkpoints, resolve_dtype(config.dtype), resumed=bool(checkpoint)
    )
    model = _load_model(context)
    trainable = count_trainable(model)
    check_trainable(trainable, adapter=config.adapter is not None)
    _say(context, f"training: {trainable}")
    report = ReportProgress(context.events, config.launch.log_every_steps)
    trainer = TokenWeightedTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=to_table(train.rows, config.batching.batch_size, tokenizer.pad_token_id),
        eval_dataset=to_table(held_out.rows, schedule.rows_a_pass, tokenizer.pad_token_id),
        callbacks=training_callbacks(config.validation, report, context.events),
    )
    history = run_to_end(trainer, checkpoint)
    if context.rank != 0:
        return None
    _save(context, trainer.model, tokenizer)
    write_training_record(history, trainable, context.output)
    passes = count_passes(
        trainer.get_train_dataloader(),
        train.rows,
        config.batching.batch_size,
        history.steps,
        last=history.best.step,
    )
    write_row_account(context.output / ROW_ACCOUNT, rows, train, passes)
    if history.best.loss >= history.before:
        context.events.warning("the held-out loss did not fall; training made the model no better")
    return training_result(history, trainable, report.tokens_per_second)


def _encode(
    context: StageContext[SftConfig], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Row], Encodings, Encodings]:
    """The training rows, and training and held-out rows as token ids."""
    config = context.config
    prepared = PreparedDataset.open(Path(context.input("dataset").path))
    if prepared.family != "chats":
        raise DataError(
            f"{config.dataset}: sft needs chats and these rows are {prepared.family}; the formats "
            "that give chats are prompt_completion, alpaca, messages and sharegpt"
        )
    _say(context, "tokenizing")
    training = prepared.train()
    sides = []
    for side, rows in (
        ("training", training),
        ("held-out", prepared.validation(config.validation.max_rows)),
    ):
        encodings = encode_rows(tokenizer, rows, config.batching.max_length)
        if not encodings.rows:
            raise DataError(f"{config.dataset}: no {side} row has a token to train on")
        if encodings.untrainable and context.rank == 0:
            context.events.warning(
                f"{encodings.untrainable} {side} rows have no token to train on and are left out"
            )
        sides.append(encodings)
    return training, sides[0], sides[1]


def _load_model(context: StageContext[SftConfig]) -> PreTrainedModel:
    """The weights to train: an adapter on a frozen base, or all of them in float32.

    Mixed precision keeps trained weights in float32 and computes in 16 bits: in bfloat16 itself
    small updates of a weight would be rounded away.
    """
    from transformers import set_seed

    config = context.config
    if context.input("model").kind == "adapter":
        raise ModelError("sft starts from complete weights; put a `merge` stage before it")
    set_seed(config.seed)
    if config.adapter is None:
        return load_causal_lm(context.input("model"), "float32")
    base = load_causal_lm(context.input("model"), resolve_dtype(config.dtype))
    return add_lora(base, config.adapter)


def _save(
    context: StageContext[SftConfig], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    from posttrain.train.outputs import cast_weights, save_adapter, save_model, stored_dtype

    _say(context, "saving")
    base = context.input("model")
    if context.config.adapter is not None:
        save_adapter(model, tokenizer, context.output, base_digest=base.digest)
    else:
        cast_weights(model, stored_dtype(base.path))
        save_model(model, tokenizer, context.output)


def _say(context: StageContext[SftConfig], message: str) -> None:
    if context.rank == 0:
        context.events.phase(message)


if __name__ == "__main__":
    run_program(SftConfig, main)
