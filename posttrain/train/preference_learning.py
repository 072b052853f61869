"""Learning from answers, the program behind `dpo`, `kto` and `orpo`.

They differ in how rows are read, in what TRL's trainer is told, and in whether there is a
reference: a `Method` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from posttrain.data.formats import FAMILIES
from posttrain.data.prepared import PreparedDataset
from posttrain.data.rows import Row
from posttrain.errors import DataError
from posttrain.hardware import resolve_dtype
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.recipe.preferences import PreferenceConfig, ReferencedConfig
from posttrain.recipe.training import TrainingConfig
from posttrain.stages.program import StageContext, StageResult
from posttrain.train.arguments import plan_schedule
from posttrain.train.attempts import begin, describe_step, say, train_as_fits, training_process
from posttrain.train.checkpoints import newest_complete
from posttrain.train.held_out import HELD_OUT_ROWS
from posttrain.train.held_out_answers import HeldOutAnswers
from posttrain.train.language_modeling import (
    held_out_rows,
    load_model,
    save_weights,
    utilization,
)
from posttrain.train.loss_page import LOSS_PAGE, write_loss_page
from posttrain.train.pairs import Answers, AnswerTable, read_pairs
from posttrain.train.preference_report import preference_result, warn_of_answers
from posttrain.train.processes import world_size
from posttrain.train.reference import with_reference, without_reference
from posttrain.train.resources import Resources
from posttrain.train.rows import ROW_ACCOUNT, count_passes
from posttrain.train.run import run_to_end, write_training_record
from posttrain.train.sharding import keep_outputs_precise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.train.callbacks import ReportProgress
    from posttrain.train.history import History
    from posttrain.train.preference_trainers import AnswerTrainer

Config = TypeVar("Config", bound=PreferenceConfig)
Referenced = TypeVar("Referenced", bound=ReferencedConfig)


@dataclass(frozen=True)
class AnswerData:
    """The rows of both sides, as the trainer reads them."""

    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    """The training side of the dataset, all of it."""
    answers: Answers
    held_out: HeldOutAnswers

    @property
    def table(self) -> AnswerTable:
        """What the trainer reads."""
        return self.answers.table


@dataclass(frozen=True)
class Method(Generic[Config]):
    """What is a method's own. Pairs without a reference need nothing of it but a trainer."""

    context: StageContext[Config]
    unit: ClassVar[str] = "Loss of a pair"
    """What the loss is, for people."""

    def read(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], fill: int) -> Answers:
        """Rows as a table, filled up to a multiple of `fill`."""
        return read_pairs(tokenizer, rows, self.context.config.batching.max_length, fill)

    def with_reference(self, table: AnswerTable, rows: list[Row], held_out: bool) -> AnswerTable:
        """The table with what a reference said of it, where that is known by now."""
        del rows, held_out
        return table

    def arguments(self, table: AnswerTable) -> dict[str, object]:
        """Fields of TRL's config class that the recipe decides."""
        del table
        raise NotImplementedError

    def trainer(self, arguments: Mapping[str, Any]) -> AnswerTrainer:
        """TRL's trainer, with what is ours."""
        raise NotImplementedError


@dataclass(frozen=True)
class ReferencedMethod(Method[Referenced]):
    """What the methods share that compare with the model as it was before."""

    name: ClassVar[Literal["dpo", "kto"]]

    def with_reference(self, table: AnswerTable, rows: list[Row], held_out: bool) -> AnswerTable:
        """The table with cached log-probabilities, or with zeros, as the recipe says."""
        match self.context.config.reference:
            case "cached":
                folder = Path(self.context.input("reference").path)
                side: Literal["train", "held_out"] = "held_out" if held_out else "train"
                return with_reference(table, rows, self.name, side, folder)
            case "none":
                return without_reference(table, self.name)
            case _:
                return table

    def reference_model(self) -> PreTrainedModel | None:
        """A frozen copy, where all weights are trained and the reference is asked at each step.

        An adapter that is switched off leaves the reference, so that one copy does for both.
        """
        config = self.context.config
        if config.adapter is not None or config.reference != "computed":
            return None
        copy = load_causal_lm(self.context.input("model"), resolve_dtype(config.dtype))
        return copy.requires_grad_(False)


def train(method: Method[Config]) -> StageResult | None:
    """Train on the dataset's answers; leave an adapter, or a full model, and its accounts.

    `training.json` has every loss and the method's own numbers, `rows.parquet` every training row,
    `held_out.parquet` every held-out one.

    Inputs: `model`, a model folder, `dataset`, a prepared dataset, and `reference`, where the
    recipe has it cached. Under torchrun every process runs this; rank 0 writes the output and
    returns the result.

    Raises:
        DataError: the dataset has rows of another kind, or none that can be trained on.
        ModelError: the model has no chat template, or a loss is not a number.
        RecipeError: `batching` or `extra_args` cannot work.
    """
    with training_process(method.context.config):
        return _train(method)


def check_family(prepared: PreparedDataset, config: TrainingConfig) -> None:
    """Refuse rows that a stage cannot read.

    Raises:
        DataError: it says which formats would do.
    """
    wanted = (config.family, *sorted(config.also_reads))
    if prepared.family not in wanted:
        formats = ", ".join(name for name, family in FAMILIES.items() if family in wanted)
        raise DataError(
            f"{config.dataset}: {config.stage} needs {' or '.join(wanted)} and these rows are "
            f"{prepared.family}; formats that it reads: {formats}"
        )


def write_answer_account(
    path: Path, rows: list[Row], answers: Answers, passes: np.ndarray | None
) -> None:
    """Leave `rows.parquet`, with the columns that `posttrain.train.rows` describes.

    A row that also fills the table up was passed as often as all of its entries together.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = answers.table
    position = np.full(len(rows), len(table), np.int64)
    for entry in range(len(table) - 1, -1, -1):
        for row in table.rows[entry]:
            position[row] = entry
    read = np.ones(len(table), np.int64) if passes is None else passes
    times, trains = table.passes_by_row(read, len(rows)), position < len(table)
    verdict = np.where(trains, np.where(times > 0, "trained", "not read"), "left out")
    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "verdict": pa.array(verdict.astype(object), pa.string()),
        "tokens": pa.array(answers.tokens, pa.int64()),
        "cut": pa.array(answers.cut, pa.int64()),
        "position": pa.array(position, pa.int64(), mask=~trains),
        "passes": pa.array(times, pa.int64(), mask=trains if passes is None else None),
    }
    pq.write_table(pa.table(columns), path, compression="zstd", version="2.6")


def _train(method: Method[Config]) -> StageResult | None:
    context = method.context
    data = _read(method)

    def attempt(micro_batch_size: int) -> StageResult | None:
        trainer, report = _make_trainer(method, data, micro_batch_size)
        say(context, "training")
        history = run_to_end(trainer, newest_complete(context.checkpoints))
        save_weights(context, trainer, data.tokenizer)
        if context.rank != 0:
            return None
        return _leave_output(method, data, trainer, history, report)

    return train_as_fits(context, Resources.watch(context, data.table), attempt)


def _read(method: Method[Config]) -> AnswerData:
    """Read and tokenize the rows of both sides."""
    context, config = method.context, method.context.config
    prepared = PreparedDataset.open(Path(context.input("dataset").path))
    check_family(prepared, config)
    say(context, "tokenizing")
    tokenizer = load_tokenizer(context.input("model"))
    rows = prepared.train()
    answers = _encode(method, tokenizer, rows, config.batching.batch_size, "training")
    groups = held_out_rows(prepared, config.dataset, config.validation.max_rows)
    every = [row for group in groups.values() for row in group]
    tasks = [number for number, group in enumerate(groups.values()) for _ in group]
    measured = _encode(method, tokenizer, every, 1, "held-out").table
    return AnswerData(
        tokenizer, rows, answers, HeldOutAnswers(every, measured, tuple(groups), tasks)
    )


def _encode(
    method: Method[Config],
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    fill: int,
    side: str,
) -> Answers:
    answers = method.read(tokenizer, rows, fill)
    if not len(answers.table):
        raise DataError(
            f"{method.context.config.dataset}: no {side} row has answers to learn from; are both "
            "answers of each pair the same, or cut to the same?"
        )
    if answers.untrainable and method.context.rank == 0:
        method.context.events.warning(
            f"{answers.untrainable} {side} rows have no answer, or two equal ones as far as "
            "`batching.max_length` lets them be read, and are left out"
        )
    table = method.with_reference(answers.table, rows, held_out=side != "training")
    return Answers(table, answers.tokens, answers.cut)


def _make_trainer(
    method: Method[Config], data: AnswerData, micro_batch_size: int
) -> tuple[AnswerTrainer, ReportProgress]:
    """A trainer that is ready to start, or to go on from the newest checkpoint."""
    from posttrain.train.adapters import adapter_callbacks
    from posttrain.train.callbacks import ReportProgress, training_callbacks
    from posttrain.train.probe import ProbeMemory

    context, config = method.context, method.context.config
    schedule = plan_schedule(config, len(data.table), world_size(), micro_batch_size)
    # Rows have columns for TRL's collators, which no model knows.
    fields = {"remove_unused_columns": False, **method.arguments(data.table)}
    start = begin(context, schedule, fields, load_model)
    lengths = np.array([n for entry in data.table.dataset["seq_lengths"] for n in entry])
    report = ReportProgress(
        context.events,
        config.launch.log_every_steps,
        utilization(context, lengths, start.trainable.count),
    )

    def describe_rows(step: int) -> str:
        return describe_step(trainer, data.table, data.rows, config.batching.batch_size, step)

    callbacks = training_callbacks(config.validation, report, context.events, describe_rows)
    trainer = method.trainer(
        {
            "model": start.model,
            "args": start.args,
            "processing_class": data.tokenizer,
            "train_dataset": data.table.dataset,
            "held_out": data.held_out,
            "callbacks": [*callbacks, *adapter_callbacks(start.model, config.adapter)],
        }
    )
    keep_outputs_precise(trainer)
    trainer.add_callback(ProbeMemory(trainer, data.table, trainer.loss_alone))
    return trainer, report


def _leave_output(
    method: Method[Config],
    data: AnswerData,
    trainer: AnswerTrainer,
    history: History,
    report: ReportProgress,
) -> StageResult:
    from posttrain.train.adapters import count_trainable

    context, best = method.context, history.best.step
    trainable = count_trainable(trainer.model)
    write_training_record(history, trainable, context.output)
    passes = count_passes(
        trainer.get_train_dataloader(),
        data.table,
        context.config.batching.batch_size,
        history.steps,
        last=best,
    )
    write_answer_account(context.output / ROW_ACCOUNT, data.rows, data.answers, passes)
    scores = data.held_out.kept(context.checkpoints, best)
    data.held_out.write_account(scores, context.output / HELD_OUT_ROWS)
    for message in warn_of_answers(history, data.held_out, scores):
        context.events.warning(message)
    result = preference_result(history, trainable, report.tokens_per_second, scores)
    title = f"{context.job.name}: {result.headline}"
    write_loss_page(history, title, context.output / LOSS_PAGE, method.unit)
    return result
