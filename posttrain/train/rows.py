"""Prepared rows as the table of token ids that a trainer reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.data.rows import Chat, Document, Row, family_of
from posttrain.errors import DataError, ModelError
from posttrain.train.tokenize import IGNORED, Encoded, encode_chat, encode_document

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encodings:
    """Sequences that can be trained on, and how many could not."""

    rows: list[Encoded]
    untrainable: int
    """Rows left out because no token of theirs adds to the loss."""

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
    encoded = [_encode_row(tokenizer, row, max_length) for row in rows]
    kept = [row for row in encoded if row.trainable]
    return Encodings(kept, untrainable=len(encoded) - len(kept))


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
