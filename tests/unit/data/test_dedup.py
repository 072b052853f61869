from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.dedup import ExactDuplicates
from posttrain.data.rows import Chat, Document, KtoExample, Message, Row
from posttrain.data.split import group_key
from posttrain.data.text import normalise
from posttrain.recipe.prepare import ExactDedup


def document(number: int, text: str) -> Document:
    return Document(id=f"id{number}", file="a", row=number, text=text)


def dropped(*rows: Row, ignore_case: bool = False) -> dict[str, str | None]:
    """Id of every dropped row and of the one kept in its place."""
    decisions = ExactDuplicates(ExactDedup(ignore_case=ignore_case)).apply(rows)
    return {item.row.id: item.kept_id for item in decisions if item.reason == "duplicate"}


def test_first_in_source_order_stays() -> None:
    rows = [document(1, "a b"), document(2, "c"), document(3, " a \n b"), document(4, "a b")]
    assert dropped(*rows) == {"id3": "id1", "id4": "id1"}


def test_unicode_forms_are_equal_and_case_is_a_choice() -> None:
    rows = [document(1, "Café"), document(2, "Cafe\u0301"), document(3, "CAFÉ")]
    assert dropped(*rows) == {"id2": "id1"}
    assert dropped(*rows, ignore_case=True) == {"id2": "id1", "id3": "id1"}


def test_roles_turns_and_labels_make_a_difference() -> None:
    one, two = Message("user", "a"), Message("assistant", "b")
    shifted = (Message("user", "ab"), Message("assistant", "c"))
    unshifted = (Message("user", "a"), Message("assistant", "bc"))
    rows: list[Row] = [
        Chat(id="1", file="a", row=1, messages=(one, two)),
        Chat(id="2", file="a", row=2, messages=(one, two, one, two)),
        Chat(id="3", file="a", row=3, messages=(two, one, two)),
        Chat(id="3a", file="a", row=3, messages=shifted),
        Chat(id="3b", file="a", row=3, messages=unshifted),
        Chat(id="3c", file="a", row=3, messages=(two, two)),
        KtoExample(id="4", file="a", row=4, prompt=(one,), completion=(two,), label=True),
        KtoExample(id="5", file="a", row=5, prompt=(one,), completion=(two,), label=False),
    ]
    assert dropped(*rows[:-2]) == {}
    assert dropped(*rows[-2:]) == {}


TEXT = st.text("aAßẞéE\u0301\u017f\u0130\u0131 \u00a0\n\u0345", max_size=6)


@given(TEXT, TEXT)
def test_duplicates_never_leak_across_the_split(one: str, other: str) -> None:
    """What either setting calls a duplicate stands on one side, so dropping it leaks nothing."""
    rows = [document(1, one), document(2, other)]
    for ignore_case in (False, True):
        if dropped(*rows, ignore_case=ignore_case):
            assert group_key(rows[0]) == group_key(rows[1])


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    for ignore_case in (False, True):
        once = normalise(text, ignore_case=ignore_case)
        assert normalise(once, ignore_case=ignore_case) == once
        assert unicodedata.is_normalized("NFC", once)


@given(st.lists(st.sampled_from("abcde"), max_size=20))
def test_every_distinct_text_is_kept_once(texts: list[str]) -> None:
    decisions = list(
        ExactDuplicates(ExactDedup()).apply([document(i, text) for i, text in enumerate(texts)])
    )
    kept = [item.row for item in decisions if item.reason is None]
    assert [row.text for row in kept if isinstance(row, Document)] == list(dict.fromkeys(texts))
    assert len(decisions) == len(texts)
