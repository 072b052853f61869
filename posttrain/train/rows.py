"""Prepared rows as the table of token ids that a trainer reads, and the account of each of them.

The account is `rows.parquet`, one line a row of the dataset's training side, in its order:

    id        the row's id, as in the dataset's ledger
    verdict   trained, not read, left out; see `RowVerdict`
    tokens    tokens of its sequence
    cut       tokens left out to stay within the longest sequence
    position  its place in the table that the trainer reads, from 0; null for a row left out
    passes    how often it was read on the way to the saved weights; null where that is not known
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
from posttrain.train.tokenize import IGNORED, Encoded, encode_chat, encode_document

if TYPE_CHECKING:
    from datasets import Dataset
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
        """Rows that were cut to the longest sequence."""
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

    Raises:
        DataError: a row is neither.
        ModelError: the chat template cannot write a chat; the message says where the chat is.
    """
    return Encodings([_encode_row(tokenizer, row, max_length) for row in rows])


def to_table(rows: Sequence[Encoded], multiple_of: int, filler_id: int) -> Dataset:
    """Columns `input_ids` and `labels`, filled up with empty rows to a multiple of `multiple_of`.

    An empty row is one token without a label: it adds nothing to loss or gradient. Without it the
    last batch of an epoch would be filled with repeated rows, as many as there are processes, and
    what is learned would depend on their number.
    """
    from datasets import Dataset

    missing = -len(rows) % multiple_of
    filled = [*rows, *[Encoded([filler_id], [IGNORED])] * missing]
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in filled],
            "labels": [row.labels for row in filled],
        }
    )


def count_passes(
    loader: DataLoader[Any],
    rows: Sequence[Encoded],
    batch_size: int,
    steps: Sequence[Step],
    last: int,
) -> np.ndarray | None:
    """How often each row was read in the first `last` optimizer steps.

    A step reads the next `batch_size` rows of the epoch's order, over all processes. The order
    depends on seed and epoch alone, so a resumed run has the one of an uninterrupted run. It is
    not taken on trust: the rows it gives for each step must have as many tokens, and as many
    trained ones, as the step counted in the batches that it really read.

    Args:
        loader: The trainer's, of the training rows.
        rows: The table's rows, without those that fill it up.
        batch_size: Rows an optimizer step.
        steps: Every optimizer step of the run, from the first.
        last: The step whose weights were kept.

    Returns:
        int64 of shape (rows,), or None where the order cannot be known.
    """
    size = len(rows) + -len(rows) % batch_size
    tokens = np.ones((2, size), np.int64)  # a row that fills up is one token, not trained on
    tokens[1, len(rows) :] = 0
    tokens[0, : len(rows)] = [len(row.input_ids) for row in rows]
    tokens[1, : len(rows)] = [row.trainable for row in rows]
    counted = np.array([(step.tokens, step.trained_tokens) for step in steps], np.int64)
    passes = np.zeros(size, np.int64)
    batches = size // batch_size
    for epoch in range(-(-len(steps) // batches)):
        order = _order(loader, epoch)
        if order is None or not np.array_equal(np.sort(order), np.arange(size)):
            return None
        first = epoch * batches
        sums = tokens[:, order].reshape(2, batches, batch_size).sum(2).T
        here = counted[first : first + batches]
        if not np.array_equal(sums[: len(here)], here):
            return None
        passes[order[: max(0, last - first) * batch_size]] += 1
    return passes[: len(rows)]


def write_row_account(
    path: Path, rows: Sequence[Row], encodings: Encodings, passes: np.ndarray | None
) -> None:
    """Leave the account of the training rows; its columns stand at the head of this module.

    Args:
        path: File to write.
        rows: The training side of the dataset, all of it.
        encodings: The same rows as sequences.
        passes: From `count_passes`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    trains = np.array([row.trainable > 0 for row in encodings.every], bool)
    position = np.cumsum(trains) - 1
    read = np.zeros(len(trains), np.int64)
    read[trains] = 1 if passes is None else passes
    verdict = np.where(trains, np.where(read > 0, "trained", "not read"), "left out")
    table = pa.table(
        {
            "id": pa.array([row.id for row in rows], pa.string()),
            "verdict": pa.array(verdict.astype(object), pa.string()),
            "tokens": pa.array([len(row.input_ids) for row in encodings.every], pa.int64()),
            "cut": pa.array([row.cut for row in encodings.every], pa.int64()),
            "position": pa.array(position, pa.int64(), mask=~trains),
            "passes": pa.array(read, pa.int64(), mask=trains if passes is None else None),
        }
    )
    pq.write_table(table, path, compression="zstd", version="2.6")


def _order(loader: DataLoader[Any], epoch: int) -> np.ndarray | None:
    """Positions in the order of an epoch; None from a sampler that needs more than the epoch."""
    from accelerate.data_loader import SeedableRandomSampler, get_sampler

    sampler = get_sampler(loader)
    if not isinstance(sampler, SeedableRandomSampler):
        return None
    sampler.set_epoch(epoch)
    return np.fromiter(sampler, np.int64)


def _encode_row(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Encoded:
    match row:
        case Document():
            return encode_document(tokenizer, row.text, max_length)
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
