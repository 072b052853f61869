"""The table that a trainer reads: rows as they are, or packed into blocks of equal length.

An entry of the table is what a batch is counted in. Without packing it is one row. With packing it
is a block of up to `max_length` tokens that holds whole rows, chosen best fit first; a document
longer than a block is cut into pieces, each a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posttrain.train.tokenize import IGNORED, Encoded

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Piece:
    """A row as one sequence, or a part of a row that is longer than a sequence may be."""

    row: int
    """Position of the row."""
    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Tokens that add to the loss; a sequence's first never does."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class TrainingTable:
    """What a trainer reads, and which rows stand where in it."""

    dataset: Dataset
    """Columns input_ids, labels, seq_lengths: the lengths of the sequences of an entry."""
    rows: list[list[int]]
    """Positions of the rows of each entry; none in an entry that only fills the table up."""
    tokens: np.ndarray
    """Tokens of each entry: int64 of shape (entries,)."""
    trained: np.ndarray
    """Tokens of each entry that add to the loss: int64 of shape (entries,)."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def longest(self) -> list[int]:
        """Entries by falling number of tokens."""
        order: list[int] = np.argsort(-self.tokens, kind="stable").tolist()
        return order


def make_table(
    rows: Sequence[Encoded], max_length: int, packing: bool, multiple_of: int, filler_id: int
) -> TrainingTable:
    """Lay rows out for training, filled up to a multiple of `multiple_of` entries.

    What fills up is one token without a label: it adds nothing to loss or gradient. Without it the
    last batch of an epoch would be filled with repeated rows, as many as there are processes, and
    what is learned would depend on their number.

    Args:
        rows: Every row as a sequence; those without a token to train on are left out.
        max_length: Longest sequence, and the length of a block.
        packing: Put several rows into an entry.
        multiple_of: Entries an optimizer step.
        filler_id: Token of an entry that fills up.
    """
    pieces = list(pieces_of(rows, max_length))
    packed = _pack(pieces, max_length) if packing else [[piece] for piece in pieces]
    return _table(packed, -len(packed) % multiple_of, filler_id)


def pieces_of(rows: Sequence[Encoded], max_length: int) -> Iterator[Piece]:
    """Sequences of at most `max_length` tokens, in the order of the rows."""
    for number, row in enumerate(rows):
        if not row.trainable:
            continue
        for start in range(0, len(row.input_ids), max_length):
            end = start + max_length
            piece = Piece(number, row.input_ids[start:end], row.labels[start:end])
            if piece.trained:
                yield piece


def held_out_table(
    groups: Sequence[Sequence[Encoded]], max_length: int, multiple_of: int, filler_id: int
) -> tuple[TrainingTable, list[int]]:
    """Rows for the held-out loss, one sequence an entry, group after group.

    Args:
        groups: Rows of each task.
        max_length: Longest sequence.
        multiple_of: Entries of a forward pass over all processes.
        filler_id: Token of an entry that fills up.

    Returns:
        The table, whose `rows` count through all groups, and the task of each row.
    """
    every = [row for group in groups for row in group]
    tasks = [number for number, group in enumerate(groups) for _ in group]
    return make_table(every, max_length, False, multiple_of, filler_id), tasks


def _pack(pieces: Sequence[Piece], capacity: int) -> list[list[Piece]]:
    """Best-fit decreasing by TRL, a thousand sequences at a time."""
    from datasets import Dataset
    from trl import pack_dataset

    # The column that is packed names the piece once a token; that is all we need to know.
    named = Dataset.from_dict(
        {"piece": [[number] * len(piece.input_ids) for number, piece in enumerate(pieces)]}
    )
    packed = pack_dataset(named, capacity, "bfd", map_kwargs={"keep_in_memory": True})
    blocks = []
    for entry in packed:
        starts = np.cumsum([0, *entry["seq_lengths"][:-1]])
        blocks.append([pieces[entry["piece"][start]] for start in starts])
    return blocks


def _table(entries: Sequence[Sequence[Piece]], missing: int, filler_id: int) -> TrainingTable:
    from datasets import Dataset

    fillers = [[Piece(-1, [filler_id], [IGNORED])]] * missing
    filled = [*entries, *fillers]
    return TrainingTable(
        dataset=Dataset.from_dict(
            {
                "input_ids": [[t for piece in entry for t in piece.input_ids] for entry in filled],
                "labels": [[t for piece in entry for t in piece.labels] for entry in filled],
                "seq_lengths": [[len(piece.input_ids) for piece in entry] for entry in filled],
            }
        ),
        rows=[sorted({piece.row for piece in entry} - {-1}) for entry in filled],
        tokens=np.array([sum(len(p.input_ids) for p in entry) for entry in filled], np.int64),
        trained=np.array([sum(p.trained for p in entry) for entry in filled], np.int64),
    )
