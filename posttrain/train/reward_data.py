"""Pairs as a reward model reads them, and what becomes of each on the way.

Importing this module imports nothing heavy.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.prepared import PreparedDataset
from posttrain.data.rows import Preference, Row
from posttrain.errors import DataError
from posttrain.recipe.reward import RewardConfig
from posttrain.stages.program import StageContext
from posttrain.store.files import write_bytes
from posttrain.train.language_modeling import held_out_rows
from posttrain.train.pairs import AnswerTable, Pair, answer_table, encode_pairs
from posttrain.train.processes import world_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORED = 2
"""Positions of a pair that the loss is about: the last one of each sequence."""


@dataclass(frozen=True)
class HeldOutPairs:
    """The pairs that a reward model is measured on while it is trained."""

    rows: Sequence[Row]
    """Those that can be compared."""
    pairs: Sequence[Pair]
    table: AnswerTable
    """Its first `len(rows)` entries are the pairs in their order; the rest repeats some."""
    task_names: Sequence[str]
    tasks: np.ndarray
    """Task of each row: int64 of shape (rows,)."""

    def measures(self, scores: np.ndarray, prefix: str) -> dict[str, float]:
        """Loss, accuracy and margin over all pairs; of several tasks the loss of each.

        Args:
            scores: Of each entry's chosen and rejected answer: float64 of shape (entries, 2).
            prefix: Begins the names: `eval` makes `eval_loss` and `eval_loss/TASK`.
        """
        margins = self.margins(scores)
        losses = negative_log_likelihood(margins)
        found = {
            f"{prefix}_loss": float(losses.mean()),
            f"{prefix}_accuracy": float(correct(margins).mean()),
            f"{prefix}_margin": float(margins.mean()),
            f"{prefix}_mean_reward": float(scores[: len(self.rows)].mean()),
        }
        if len(self.task_names) > 1:
            for number, name in enumerate(self.task_names):
                # MLflow takes fewer characters in a metric's name than a recipe in a dataset's.
                task = re.sub(r"[^\w.-]", "_", name)
                found[f"{prefix}_loss/{task}"] = float(losses[self.tasks == number].mean())
        return found

    def margins(self, scores: np.ndarray) -> np.ndarray:
        """Score of the chosen answer less the rejected one's: float64 of shape (rows,)."""
        own = scores[: len(self.rows)]
        difference: np.ndarray = own[:, 0] - own[:, 1]
        return difference

    def keep(self, scores: np.ndarray, folder: Path, step: int) -> None:
        """Remember an evaluation, for the account of the step that turns out to be the best."""
        file = io.BytesIO()
        np.save(file, scores)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / _file(step), file.getvalue())

    def kept(self, folder: Path, step: int) -> np.ndarray:
        """The scores of an evaluation: float64 of shape (rows, 2)."""
        scores: np.ndarray = np.load(folder / _file(step))[: len(self.rows)]
        return scores


@dataclass(frozen=True)
class RewardData:
    """The pairs of both sides, as the trainer reads them."""

    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    """The training side of the dataset, all of it."""
    pairs: list[Pair]
    table: AnswerTable
    held_out: HeldOutPairs

    @property
    def widths(self) -> np.ndarray:
        """Tokens of the longer sequence of each entry: int64 of shape (entries,)."""
        return np.array([self.pairs[row].longest for (row,) in self.table.rows], np.int64)

    def sample(self, most: int, multiple_of: int) -> AnswerTable:
        """At most `most` training pairs, evenly spread over the rows."""
        kept = [pair for pair in self.pairs if pair.trainable]
        positions = np.linspace(0, len(kept) - 1, min(most, len(kept))).round().astype(int)
        chosen = [kept[position] for position in positions]
        return pair_table(chosen, [0.0] * len(chosen), multiple_of)


def negative_log_likelihood(margins: np.ndarray) -> np.ndarray:
    """-log sigmoid(margin), in nats a pair: Bradley-Terry's, of the order that people chose."""
    loss: np.ndarray = np.logaddexp(0.0, -margins)
    return loss


def correct(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen answer has the higher score, 0 where the lower, a half for a tie."""
    right: np.ndarray = (np.sign(margins) + 1) / 2
    return right


def read_pairs(
    context: StageContext[RewardConfig], tokenizer: PreTrainedTokenizerBase
) -> RewardData:
    """Read and tokenize the pairs of both sides.

    Raises:
        DataError: the dataset has rows of another kind, or none that can be compared.
        ModelError: the model has no chat template, or one that cannot write a row.
    """
    config = context.config
    prepared = PreparedDataset.open(Path(context.input("dataset").path))
    if prepared.family != config.family:
        raise DataError(
            f"{config.dataset}: {config.stage} needs {config.family} and these rows are "
            f"{prepared.family}; the format that gives {config.family} is `preference`"
        )
    rows = prepared.train()
    pairs = _encode(context, tokenizer, rows, "training")
    margins = [_margin(row) if config.use_margins else 0.0 for row in rows]
    table = pair_table(pairs, margins, config.batching.batch_size)
    return RewardData(tokenizer, rows, pairs, table, _held_out(context, prepared, tokenizer))


def pair_table(pairs: Sequence[Pair], margins: Sequence[float], multiple_of: int) -> AnswerTable:
    """Columns that TRL's collator wants: both whole sequences, and margins where there are any.

    Of a pair two positions are trained on, so a step's losses are weighted by its pairs.
    """
    kept = [number for number, pair in enumerate(pairs) if pair.trainable]
    columns: dict[str, Sequence[object]] = {
        "chosen_ids": [pairs[n].prompt_ids + pairs[n].chosen_ids for n in kept],
        "rejected_ids": [pairs[n].prompt_ids + pairs[n].rejected_ids for n in kept],
    }
    if any(margins):
        columns["margin"] = [margins[number] for number in kept]
    tokens = [pairs[number].tokens for number in kept]
    return answer_table(columns, kept, tokens, [SCORED] * len(kept), multiple_of)


def write_pair_account(path: Path, data: RewardData, passes: np.ndarray | None) -> None:
    """Leave the account of the training rows; `posttrain.train.rows` has its columns.

    A row that stands in several entries was read as often as all of them together.

    Args:
        path: File to write.
        data: The rows, and what the trainer read.
        passes: How often each entry was read, from `count_passes`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = len(data.rows)
    entries = [members[0] for members in data.table.rows[: data.table.distinct]]
    position = np.full(count, -1, np.int64)
    position[entries] = np.arange(len(entries))
    trains = position >= 0
    read = None if passes is None else data.table.passes_by_row(passes, count)
    begun = trains if read is None else read > 0
    verdict = np.where(trains, np.where(begun, "trained", "not read"), "left out")
    columns = {
        "id": pa.array([row.id for row in data.rows], pa.string()),
        "verdict": pa.array(verdict.astype(object), pa.string()),
        "tokens": pa.array([pair.tokens for pair in data.pairs], pa.int64()),
        "cut": pa.array([pair.cut for pair in data.pairs], pa.int64()),
        "position": pa.array(position, pa.int64(), mask=~trains),
        "passes": pa.array(
            np.zeros(count, np.int64) if read is None else read,
            pa.int64(),
            mask=trains if read is None else None,
        ),
    }
    pq.write_table(pa.table(columns), path, compression="zstd", version="2.6")


def _held_out(
    context: StageContext[RewardConfig],
    prepared: PreparedDataset,
    tokenizer: PreTrainedTokenizerBase,
) -> HeldOutPairs:
    config = context.config
    groups = held_out_rows(prepared, config.dataset, config.validation.max_rows)
    every = [row for group in groups.values() for row in group]
    tasks = [number for number, group in enumerate(groups.values()) for _ in group]
    pairs = _encode(context, tokenizer, every, "held-out")
    kept = [number for number, pair in enumerate(pairs) if pair.trainable]
    return HeldOutPairs(
        rows=[every[number] for number in kept],
        pairs=[pairs[number] for number in kept],
        table=pair_table(pairs, [0.0] * len(pairs), config.micro_batch_size * world_size()),
        task_names=tuple(groups),
        tasks=np.array([tasks[number] for number in kept], np.int64),
    )


def _encode(
    context: StageContext[RewardConfig],
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    side: str,
) -> list[Pair]:
    config = context.config
    max_length = config.batching.max_length
    pairs = encode_pairs(tokenizer, rows, max_length)
    kept = [pair for pair in pairs if pair.trainable]
    if not kept:
        raise DataError(f"{config.dataset}: no {side} row has two answers that can be compared")
    if context.rank != 0:
        return pairs
    if len(kept) < len(pairs):
        context.events.warning(
            f"{len(pairs) - len(kept)} {side} pairs have an answer without a token, or two that "
            f"are the same within {max_length} tokens, and are left out"
        )
    endless = sum(_loses_end(pair, max_length) for pair in kept)
    if endless:
        context.events.warning(
            f"{endless} {side} pairs have an answer that is cut at its end, where it is scored; "
            f"write `batching: {{max_length: ...}}` above {max_length} to read more of them"
        )
    return pairs


def _loses_end(pair: Pair, max_length: int) -> bool:
    """Whether an answer was too long for what the prompt leaves, or half of the length."""
    return pair.cut > 0 and pair.longest >= max_length and len(pair.prompt_ids) <= max_length // 2


def _margin(row: Row) -> float:
    return row.margin or 0.0 if isinstance(row, Preference) else 0.0


def _file(step: int) -> str:
    return f"held_out-{step}.npy"
