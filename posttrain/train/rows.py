"""Prepared rows as the table of token ids that a trainer reads, and the account of each of them.

The account is `rows.parquet`, one line a row of the dataset's training side, in its order:

    id        the row's id, as in the dataset's ledger
    verdict   trained, not read, left out; see `RowVerdict`
    tokens    tokens of its sequence
    cut       tokens left out to stay within the longest sequence
    position  the first entry of the trainer's table that holds it, from 0; null for a row left out
    passes    how often all of it was read on the way to the saved weights; null where that is not
              known
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from posttrain.data.rows import Chat, Document, Row, family_of
from posttrain.errors import DataError, ModelError
from posttrain.train.tables import TrainingTable
from posttrain.train.tokenize import Encoded, encode_chat, encode_document

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase

    from posttrain.train.history import Step

ROW_ACCOUNT = "rows.parquet"
"""File of a trained artifact that says of every training row what became of it."""

RowVerdict = Literal["trained", "not read", "left out"]
"""`not read`: in the training set, but training ended, or the kept checkpoint was taken, before
the row was read. `left out`: no token of it adds to the loss. `trained` with unknown passes: in
the training set, and it cannot be said whether it was read."""


@dataclass(frozen=True)
class Encodings:
    """Rows as sequences, in their order; those that cannot be trained on included."""

    every: list[Encoded]

    @cached_property
    def rows(self) -> list[Encoded]:
        """Sequences that can be trained on."""
        return [row for row in self.every if row.trainable]

    @property
    def untrainable(self) -> int:
        """Rows left out because no token of theirs adds to the loss."""
        return len(self.every) - len(self.rows)

    @property
    def truncated(self) -> int:
        """Chats that were cut to the longest sequence."""
        return sum(row.cut > 0 for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row before it was cut."""
        return max((len(row.input_ids) + row.cut for row in self.rows), default=0)

    @property
    def trainable_share(self) -> float:
        """Trained tokens per token."""
        tokens = sum(len(row.input_ids) for row in self.rows)
        return sum(row.trainable for row in self.rows) / tokens if tokens else 0.0


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int
) -> Encodings:
    """Tokenize chats or documents, and set aside those that would train nothing.

    Chats are cut to `max_length`; documents are not, they go on in a sequence of their own.

    Raises:
        DataError: a row is neither.
        ModelError: the chat template cannot write a chat; the message says where the chat is.
    """
    return Encodings([_encode_row(tokenizer, row, max_length) for row in rows])


def count_passes(
    loader: DataLoader[Any],
    table: TrainingTable,
    batch_size: int,
    steps: Sequence[Step],
    last: int,
) -> np.ndarray | None:
    """How often each entry was read in the first `last` optimizer steps.

    A step reads the next `batch_size` entries of the epoch's order, over all processes. The order
    depends on seed and epoch alone, so a resumed run has the one of an uninterrupted run. It is
    not taken on trust: the entries it gives for each step must have as many tokens, and as many
    trained ones, as the step counted in the batches that it really read.

    Args:
        loader: The trainer's, of the training rows.
        table: What it reads.
        batch_size: Entries an optimizer step.
        steps: Every optimizer step of the run, from the first.
        last: The step whose weights were kept.

    Returns:
        int64 of shape (entries,), or None where the order cannot be known.
    """
    size, tokens = len(table), np.stack([table.tokens, table.trained])
    counted = np.array([(step.tokens, step.trained_tokens) for step in steps], np.int64)
    passes = np.zeros(size, np.int64)
    batches = size // batch_size
    for epoch in range(-(-len(steps) // batches)):
        order = epoch_order(loader, epoch)
        if order is None or not np.array_equal(np.sort(order), np.arange(size)):
            return None
        first = epoch * batches
        sums = tokens[:, order].reshape(2, batches, batch_size).sum(2).T
        here = counted[first : first + batches]
        if not np.array_equal(sums[: len(here)], here):
            return None
        passes[order[: max(0, last - first) * batch_size]] += 1
    return passes


def rows_of_step(
    loader: DataLoader[Any], table: TrainingTable, batch_size: int, step: int
) -> list[int]:
    """Positions of the rows that optimizer step `step` (from 1) read; empty where not known."""
    epoch, batch = divmod(step - 1, len(table) // batch_size)
    order = epoch_order(loader, epoch)
    if order is None:
        return []
    entries = order[batch * batch_size : (batch + 1) * batch_size]
    return sorted({row for entry in entries for row in table.rows[entry]})


def write_row_account(
    path: Path,
    rows: Sequence[Row],
    encodings: Encodings,
    table: TrainingTable,
    passes: np.ndarray | None,
) -> None:
    """Leave the account of the training rows; its columns stand at the head of this module.

    Args:
        path: File to write.
        rows: The training side of the dataset, all of it.
        encodings: The same rows as sequences.
        table: What the trainer read.
        passes: From `count_passes`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = len(rows)
    position = np.full(count, len(table), np.int64)
    fewest, most = np.full(count, np.iinfo(np.int64).max), np.zeros(count, np.int64)
    read = np.ones(len(table), np.int64) if passes is None else passes
    for entry, members in enumerate(table.rows):
        for row in members:
            position[row] = min(position[row], entry)
            fewest[row], most[row] = min(fewest[row], read[entry]), max(most[row], read[entry])
    trains = position < len(table)
    verdict = np.where(trains, np.where(most > 0, "trained", "not read"), "left out")
    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "verdict": pa.array(verdict.astype(object), pa.string()),
        "tokens": pa.array([len(row.input_ids) for row in encodings.every], pa.int64()),
        "cut": pa.array([row.cut for row in encodings.every], pa.int64()),
        "position": pa.array(position, pa.int64(), mask=~trains),
        "passes": pa.array(
            np.where(trains, fewest, 0), pa.int64(), mask=trains if passes is None else None
        ),
    }
    pq.write_table(pa.table(columns), path, compression="zstd", version="2.6")


def epoch_order(loader: DataLoader[Any], epoch: int) -> np.ndarray | None:
    """Entries in the order of an epoch; None from a sampler that needs more than the epoch."""
    from accelerate.data_loader import SeedableRandomSampler, get_sampler

    sampler = get_sampler(loader)
    if not isinstance(sampler, SeedableRandomSampler):
        return None
    sampler.set_epoch(epoch)
    return np.fromiter(sampler, np.int64)


def _encode_row(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Encoded:
    match row:
        case Document():
            return encode_document(tokenizer, row.text)
        case Chat():
            try:
                return encode_chat(tokenizer, row.messages, max_length)
            except ModelError as error:
                raise ModelError(f"{row.file}:{row.row}: {error}") from error
        case _:
            raise DataError(
                f"{row.file}:{row.row}: this stage reads chats or documents, and the row is of "
                f"the family {family_of(row)}"
            )
