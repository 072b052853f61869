"""Learning to score answers from pairs, the program behind `reward`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from posttrain.errors import ModelError
from posttrain.hardware import resolve_dtype
from posttrain.models import load_tokenizer
from posttrain.recipe.reward import RewardConfig
from posttrain.stages.program import StageContext, StageResult
from posttrain.train.arguments import plan_schedule
from posttrain.train.attempts import begin, describe_step, say, train_as_fits, training_process
from posttrain.train.checkpoints import newest_complete
from posttrain.train.held_out import HELD_OUT_ROWS
from posttrain.train.language_modeling import save_weights, utilization
from posttrain.train.loss_page import LOSS_PAGE, write_loss_page
from posttrain.train.processes import world_size
from posttrain.train.resources import Resources, forget_peak, resident
from posttrain.train.reward_data import RewardData, read_pairs, write_pair_account
from posttrain.train.reward_model import RewardRecord
from posttrain.train.reward_page import REWARD_PAGE, write_reward_page
from posttrain.train.reward_report import (
    HeldOutScores,
    report_metrics,
    report_of,
    report_warnings,
)
from posttrain.train.rows import ROW_ACCOUNT, count_passes
from posttrain.train.run import run_to_end, training_result, write_training_record
from posttrain.train.sharding import (
    adapters_in_float32,
    keep_outputs_precise,
    loading_dtype,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from posttrain.train.callbacks import ReportProgress
    from posttrain.train.history import History
    from posttrain.train.reward_trainer import PairwiseTrainer

_REFERENCE_PAIRS = 200
"""Training pairs, at most, whose scores say where a reward model's zero is: the mean of 400 scores
is known to a twentieth of their standard deviation, and a pass over all rows takes long."""


@dataclass(frozen=True)
class _Run:
    """A run that has ended, with the best weights restored."""

    trainer: PairwiseTrainer
    report: ReportProgress
    history: History
    reference: np.ndarray
    """Scores of training pairs: float64 of shape (pairs, 2)."""


def train(context: StageContext[RewardConfig]) -> StageResult | None:
    """Train on the dataset's pairs; leave a reward model and its accounts.

    `training.json` has every loss, `rows.parquet` every training row, `held_out.parquet` the scores
    of every held-out pair, `reward.json` what the scores are relative to, `reward.html` a picture.

    Inputs: `model`, a model folder, and `dataset`, a prepared dataset of preferences. Under
    torchrun every process runs this; rank 0 writes the output and returns the result.

    Raises:
        DataError: the dataset has rows of another kind, or none that can be compared.
        ModelError: the model has no chat template or no form that scores, or a loss is not a
            number.
        RecipeError: `batching` or `extra_args` cannot work.
    """
    with training_process(context.config):
        return _train(context)


def _train(context: StageContext[RewardConfig]) -> StageResult | None:
    from posttrain.train.reward_head import choose_padding

    say(context, "tokenizing")
    tokenizer = load_tokenizer(context.input("model"))
    choose_padding(tokenizer)
    data = read_pairs(context, tokenizer)
    forget_peak()
    # Without an estimate: that of `posttrain plan` is for rows that are laid end to end and for
    # logits over a vocabulary.
    resources = Resources(None, resident(), context.config.micro_batch_size)

    def attempt(micro_batch_size: int) -> StageResult | None:
        trainer, report = _make_trainer(context, data, micro_batch_size)
        say(context, "training")
        history = run_to_end(trainer, newest_complete(context.checkpoints))
        say(context, "scoring training pairs")
        reference = data.sample(_REFERENCE_PAIRS, micro_batch_size * world_size())
        run = _Run(trainer, report, history, trainer.score(reference))
        save_weights(context, trainer, tokenizer)
        return _leave_output(context, data, run) if context.rank == 0 else None

    return train_as_fits(context, resources, attempt)


def _make_trainer(
    context: StageContext[RewardConfig], data: RewardData, micro_batch_size: int
) -> tuple[PairwiseTrainer, ReportProgress]:
    """A trainer that is ready to start, or to go on from the newest checkpoint."""
    from posttrain.train.adapters import adapter_callbacks
    from posttrain.train.callbacks import ReportProgress, training_callbacks
    from posttrain.train.probe import ProbeMemory
    from posttrain.train.reward_trainer import PairwiseTrainer, sum_of_scores

    config = context.config
    schedule = plan_schedule(config, len(data.table), world_size(), micro_batch_size)
    method: dict[str, object] = {
        # Pairs come tokenized and in their final length; longer ones TRL would leave out.
        "max_length": None,
        "center_rewards_coefficient": config.center or None,
        # TRL would switch off the adapter's dropout as well, which the recipe asks for.
        "disable_dropout": config.extra_args.get("disable_dropout", False),
    }
    start = begin(context, schedule, method, _load_model)
    report = ReportProgress(
        context.events,
        config.launch.log_every_steps,
        utilization(context, data.widths, start.trainable.count),
    )

    def describe_rows(step: int) -> str:
        return describe_step(trainer, data.table, data.rows, config.batching.batch_size, step)

    callbacks = training_callbacks(
        config.validation, report, context.events, describe_rows, next_token_loss=False
    )
    trainer = PairwiseTrainer(
        model=start.model,
        args=start.args,
        processing_class=data.tokenizer,
        train_dataset=data.table.dataset,
        held_out=data.held_out,
        callbacks=[*callbacks, *adapter_callbacks(start.model, config.adapter)],
    )
    keep_outputs_precise(trainer)
    # Pairs are padded to the longest sequence of a pass.
    widest = replace(data.table, tokens=data.widths)
    trainer.add_callback(ProbeMemory(trainer, widest, loss=sum_of_scores))
    return trainer, report


def _load_model(context: StageContext[RewardConfig], steps: int) -> PreTrainedModel:
    """The weights to train: an adapter and the head on a frozen body, or all of them in float32."""
    from transformers import set_seed

    from posttrain.train.adapters import add_adapter
    from posttrain.train.reward_head import HEAD, load_body, start_head

    config, base = context.config, context.input("model")
    if base.kind == "adapter":
        raise ModelError("reward starts from complete weights; put a `merge` stage before it")
    set_seed(config.seed)
    dtype = resolve_dtype(config.dtype)
    precision = dtype if config.quantization is not None else loading_dtype(config, dtype)
    model = load_body(base, precision, config.quantization)
    start_head(model, config.seed)
    if config.adapter is None:
        return model
    return add_adapter(model, config.adapter, steps, adapters_in_float32(config, dtype), HEAD)


def _leave_output(context: StageContext[RewardConfig], data: RewardData, run: _Run) -> StageResult:
    from posttrain.train.adapters import count_trainable

    config, output, history = context.config, context.output, run.history
    trainable = count_trainable(run.trainer.model)
    write_training_record(history, trainable, output)
    passes = count_passes(
        run.trainer.get_train_dataloader(),
        data.table,
        config.batching.batch_size,
        history.steps,
        last=history.best.step,
    )
    write_pair_account(output / ROW_ACCOUNT, data, passes)
    record = RewardRecord(
        max_length=config.batching.max_length,
        mean=float(run.reference.mean()),
        std=float(run.reference.std()),
        pairs=len(run.reference),
    )
    record.write(output)
    kept = data.held_out.kept(context.checkpoints, history.best.step)
    scores = HeldOutScores.of(data.held_out, kept - record.mean)
    scores.write(output / HELD_OUT_ROWS)
    result = training_result(history, trainable, run.report.tokens_per_second, config.family)
    return _describe(context, scores, record, history, result)


def _describe(
    context: StageContext[RewardConfig],
    scores: HeldOutScores,
    record: RewardRecord,
    history: History,
    result: StageResult,
) -> StageResult:
    """Draw the pages, warn, and add what is known of the scores to the result."""
    report = report_of(scores)
    if history.best.loss >= history.before:
        context.events.warning("the held-out loss did not fall; training made the model no better")
    for warning in report_warnings(report):
        context.events.warning(warning)
    accuracy = report.accuracy
    headline = (
        f"held-out accuracy {accuracy.value:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%}), "
        f"{result.headline}"
    )
    title = f"{context.job.name}: {headline}"
    write_loss_page(history, title, context.output / LOSS_PAGE, unit="Nats a pair")
    write_reward_page(scores, report, title, context.output / REWARD_PAGE)
    usual = {name: v for name, v in result.metrics.items() if "perplexity" not in name}
    spread = {"score_mean": record.mean, "score_std": record.std}
    return result.model_copy(
        update={"headline": headline, "metrics": {**usual, **report_metrics(report), **spread}}
    )
