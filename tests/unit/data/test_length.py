from __future__ import annotations

import pytest

from posttrain.data.length import Length, trainable_characters, whole_characters
from posttrain.data.rows import Chat, Document, KtoExample, Message, Preference, Row
from posttrain.recipe.prepare import LengthBounds

USER, ANSWER, WORSE = (
    Message("user", "12345"),
    Message("assistant", "123"),
    Message("assistant", "1"),
)


@pytest.mark.parametrize(
    ("row", "trainable", "whole"),
    [
        (Document(text="1234", id="x", file="a", row=1), 4, 4),
        (Chat(messages=(USER, ANSWER, USER, WORSE), id="x", file="a", row=1), 4, 14),
        (
            Preference(
                prompt=(USER,), chosen=(ANSWER,), rejected=(WORSE,), id="x", file="a", row=1
            ),
            1,
            8,
        ),
        (
            KtoExample(prompt=(USER,), completion=(ANSWER,), label=True, id="x", file="a", row=1),
            3,
            8,
        ),
    ],
)
def test_lower_bound_is_on_answers_and_upper_bound_on_all(
    row: Row, trainable: int, whole: int
) -> None:
    assert trainable_characters(row) == trainable
    assert whole_characters(row) == whole

    def reason(**bounds: int) -> str | None:
        (decision,) = Length(LengthBounds(**bounds)).apply([row])
        return decision.reason

    assert reason(min_characters=trainable, max_characters=whole) is None
    assert reason(min_characters=trainable + 1) == "too short"
    assert reason(max_characters=whole - 1) == "too long"


def test_detail_has_the_numbers() -> None:
    row = Document(text="x" * 1_200, id="x", file="a", row=1)
    (decision,) = Length(LengthBounds(max_characters=1_000)).apply([row])
    assert decision.detail == "1,200 characters, max_characters is 1,000"
