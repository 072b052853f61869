from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.rows import Chat, Document, Message, Preference
from posttrain.data.split import group_key, split_rows
from posttrain.errors import DataError

TEXTS = st.lists(st.text(string.ascii_letters + " é\n", min_size=1), min_size=1, max_size=40)
FRACTIONS = st.floats(0.01, 0.99)


def documents(texts: list[str]) -> list[Document]:
    return [Document(id=str(i), file="a", row=i, text=text) for i, text in enumerate(texts)]


def chat(prompt: str, answer: str, subject: str | None = None) -> Chat:
    messages = (Message("user", prompt), Message("assistant", answer))
    return Chat(id=prompt + answer, file="a", row=1, messages=messages, subject=subject)


@given(TEXTS, FRACTIONS)
def test_both_sides_get_rows_and_no_group_straddles(texts: list[str], fraction: float) -> None:
    rows = documents(texts)
    if len({group_key(row) for row in rows}) < 2:
        with pytest.raises(DataError, match="cannot hold rows out"):
            split_rows(rows, fraction)
        return
    sides = split_rows(rows, fraction)
    assert set(sides) == {"train", "held_out"}
    of_group: dict[str, set[str]] = {}
    for row, side in zip(rows, sides, strict=True):
        of_group.setdefault(group_key(row), set()).add(side)
    assert all(len(sides_of_group) == 1 for sides_of_group in of_group.values())


@given(TEXTS, FRACTIONS)
def test_adding_and_reordering_rows_moves_none(more: list[str], fraction: float) -> None:
    # Enough rows that neither side is empty by chance, whatever is added.
    base = [f"base {number}" for number in range(2_000)]
    before = dict(zip(base, split_rows(documents(base), fraction), strict=True))
    everything = more + base[::-1]
    after = dict(zip(everything, split_rows(documents(everything), fraction), strict=True))
    assert {text: after[text] for text in base} == before


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_share_is_as_asked(fraction: float) -> None:
    sides = split_rows(documents([str(number) for number in range(5_000)]), fraction)
    assert sides.count("held_out") / 5_000 == pytest.approx(fraction, abs=0.02)


def test_same_prompt_is_one_group_whatever_follows() -> None:
    one = chat("What is  NaN?", "A number.")
    two = Chat(
        id="x", file="b", row=2, messages=(*one.messages, *chat("And inf?", "Too.").messages)
    )
    system = Message("system", "Be brief.")
    three = Chat(id="y", file="b", row=3, messages=(system, *chat("what is nan?\n", "N.").messages))
    pair = Preference(
        id="z",
        file="c",
        row=4,
        prompt=one.messages[:1],
        chosen=one.messages[1:],
        rejected=(Message("assistant", "Bread."),),
    )
    assert len({group_key(row) for row in (one, two, three, pair)}) == 1
    assert group_key(chat("What is NaN", "A number.")) != group_key(one)


def test_rows_about_one_subject_stay_together() -> None:
    about = [chat("What is it?", "x", "str.join"), chat("How do I call it?", "y", "str.join")]
    assert group_key(about[0]) == group_key(about[1])
    assert group_key(about[0]) != group_key(chat("What is it?", "x", "str.split"))
