from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.data.operations.length import Length, trainable_characters, whole_characters
from posttrain.data.rows import Chat, Document, KtoExample, Message, Preference, Row
from posttrain.recipe.prepare import LengthBounds
from tests.unit.data.corpora import decide, documents

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
        drops = decide(Length(LengthBounds(**bounds)), [row]).drops
        return drops[0].reason if drops else None

    assert reason(min_characters=trainable, max_characters=whole) is None
    assert reason(min_characters=trainable + 1) == "too short"
    assert reason(max_characters=whole - 1) == "too long"


def test_detail_has_the_numbers() -> None:
    row = Document(text="x" * 1_200, id="x", file="a", row=1)
    drops = decide(Length(LengthBounds(max_characters=1_000)), [row]).drops
    assert drops[0].detail == "1,200 characters; at most 1,000"


def test_tokens_are_those_of_the_model(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["word " * 40, "another text with några ord " * 3, "x"]
    tokens = [len(AutoTokenizer.from_pretrained(tiny_model)(text)["input_ids"]) for text in texts]
    config = LengthBounds(max_tokens=tokens[1])
    drops = decide(Length(config, tiny_model), documents(texts)).drops
    assert {row: drop.reason for row, drop in drops.items()} == {0: "too many tokens"}
    assert drops[0].detail == f"{tokens[0]:,} tokens; at most {tokens[1]:,}"
