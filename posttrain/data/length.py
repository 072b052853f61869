"""Length bounds, in characters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from posttrain.data.operations import Decision
from posttrain.data.rows import Chat, Document, KtoExample, Messages, Preference, Row
from posttrain.recipe.prepare import LengthBounds


class Length:
    """Drops rows with too little to learn from, or too long as a whole."""

    name = "length"

    def __init__(self, config: LengthBounds) -> None:
        self._config = config

    def apply(self, rows: Iterable[Row]) -> Iterator[Decision]:
        """One decision a row; see `posttrain.data.operations`."""
        lower, upper = self._config.min_characters, self._config.max_characters
        for row in rows:
            trainable, whole = trainable_characters(row), whole_characters(row)
            if trainable < lower:
                detail = f"{trainable:,} trainable characters, min_characters is {lower:,}"
                yield Decision(row, reason="too short", detail=detail)
            elif whole > upper:
                detail = f"{whole:,} characters, max_characters is {upper:,}"
                yield Decision(row, reason="too long", detail=detail)
            else:
                yield Decision(row)


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
