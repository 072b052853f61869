from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.operations.exact_dedup import ExactDuplicates
from posttrain.data.rows import Chat, KtoExample, Message, Row
from posttrain.data.split import group_key
from posttrain.data.text import normalise
from posttrain.recipe.prepare import ExactDedup
from tests.unit.data import corpora
from tests.unit.data.corpora import document, documents, drops_of


def dropped(*rows: Row, ignore_case: bool = False) -> dict[int, int]:
    """Number of every dropped row and of the one kept in its place."""
    return corpora.dropped(ExactDuplicates(ExactDedup(ignore_case=ignore_case)), rows)


def test_first_in_source_order_stays() -> None:
    rows = [document(1, "a b"), document(2, "c"), document(3, " a \n b"), document(4, "a b")]
    assert dropped(*rows) == {3: 1, 4: 1}


def test_unicode_forms_are_equal_and_case_is_a_choice() -> None:
    rows = [document(1, "Café"), document(2, "Cafe\u0301"), document(3, "CAFÉ")]
    assert dropped(*rows) == {2: 1}
    assert dropped(*rows, ignore_case=True) == {2: 1, 3: 1}


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


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=20), st.integers(1, 9))
def test_every_distinct_text_is_kept_once(texts: list[str], batch_size: int) -> None:
    drops = drops_of(ExactDuplicates(ExactDedup()), documents(texts), batch_size)
    kept = [text for row, text in enumerate(texts) if row not in set(drops.rows)]
    assert kept == list(dict.fromkeys(texts))
    assert all(texts[row] == texts[kept] for row, kept in zip(drops.rows, drops.kept, strict=True))


@given(
    st.lists(st.sampled_from(["a b", "a  b", "A b", "c"]), min_size=1, max_size=12), st.randoms()
)
def test_what_is_said_does_not_depend_on_the_order(texts: list[str], random: object) -> None:
    shuffled = texts.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    said = []
    for order in (texts, shuffled):
        gone = set(drops_of(ExactDuplicates(ExactDedup()), documents(order)).rows)
        said.append(sorted(normalise(t) for row, t in enumerate(order) if row not in gone))
    assert said[0] == said[1]


def test_rows_of_another_dataset_push_ours_out_and_are_never_dropped() -> None:
    rows = documents(["theirs", "theirs", "ours", "theirs", "ours"])
    config = ExactDedup(against=("other",))
    drops = drops_of(ExactDuplicates(config), rows, foreign=[True, True, False, False, False])
    assert (drops.rows.tolist(), drops.kept.tolist()) == ([3, 4], [0, 2])
