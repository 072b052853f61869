"""Length bounds, in characters and in tokens."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.batch import RowBatch
from posttrain.data.operations.base import Decisions, Drop
from posttrain.data.rows import Chat, Document, KtoExample, Messages, Preference, Row
from posttrain.errors import ModelError
from posttrain.recipe.prepare import LengthBounds

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Length:
    """Drops rows with too little to learn from, or too long as a whole."""

    name = "length"

    def __init__(self, config: LengthBounds, tokenizer: Path | None = None) -> None:
        """`tokenizer` is a model's folder, needed for `max_tokens` alone."""
        self._config = config
        self._tokenizer = tokenizer

    def apply(self, batch: RowBatch) -> Decisions:
        """One look at each row; see `posttrain.data.operations.base`."""
        decisions = Decisions()
        if batch.family == "documents":
            sizes = [(len(text), len(text)) for text in batch.texts]
        else:
            sizes = [(trainable_characters(row), whole_characters(row)) for row in batch.rows]
        lower, upper = self._config.min_characters, self._config.max_characters
        for position, (trainable, whole) in enumerate(sizes):
            if trainable < lower:
                detail = f"{trainable:,} trainable characters; at least {lower:,}"
                decisions.drops[position] = Drop("too short", detail)
            elif whole > upper:
                detail = f"{whole:,} characters; at most {upper:,}"
                decisions.drops[position] = Drop("too long", detail)
        if self._config.max_tokens is not None:
            self._bound_tokens(batch, self._config.max_tokens, decisions)
        return decisions

    def _bound_tokens(self, batch: RowBatch, bound: int, decisions: Decisions) -> None:
        """The tokens of the texts themselves; a chat template adds a few a turn."""
        assert self._tokenizer is not None
        # No token is shorter than a character's share of bytes: short texts need no counting.
        long = [i for i, text in enumerate(batch.texts) if len(text.encode()) > bound]
        encoded = _tokenizer(self._tokenizer).encode_batch_fast(
            [batch.texts[i] for i in long], add_special_tokens=False
        )
        for position, encoding in zip(long, encoded, strict=True):
            if len(encoding) > bound:
                detail = f"{len(encoding):,} tokens; at most {bound:,}"
                decisions.drops.setdefault(position, Drop("too many tokens", detail))


@functools.cache
def _tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no tokenizer.json; `length.max_tokens` needs a fast tokenizer")
    return Tokenizer.from_file(str(path))


def trainable_characters(row: Row) -> int:
    """Characters that training learns to write; of a preference, its shorter continuation."""
    match row:
        case Document():
            return len(row.text)
        case Chat():
            return _answers(row.messages)
        case Preference():
            return min(_answers(row.chosen), _answers(row.rejected))
        case KtoExample():
            return _answers(row.completion)


def whole_characters(row: Row) -> int:
    """Characters of the longest sequence the row makes, prompt included."""
    match row:
        case Document():
            return len(row.text)
        case Chat():
            return _total(row.messages)
        case Preference():
            return _total(row.prompt) + max(_total(row.chosen), _total(row.rejected))
        case KtoExample():
            return _total(row.prompt) + _total(row.completion)


def _answers(messages: Messages) -> int:
    return sum(len(message.content) for message in messages if message.role == "assistant")


def _total(messages: Messages) -> int:
    return sum(len(message.content) for message in messages)
