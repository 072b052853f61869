from __future__ import annotations

import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.rows import Chat, Message, Preference, Row
from posttrain.data.split import SIDES, SplitResult, Splitter, group_key
from posttrain.errors import DataError
from posttrain.recipe.prepare import Split
from tests.unit.data.corpora import MemoryCorpus, MemorySketches, batch_of, chat, documents

TEXTS = st.lists(st.text(string.ascii_letters + " é\n", min_size=1), min_size=1, max_size=40)
SHARES = st.floats(0.01, 0.99)


def split(rows: list[Row], foreign: list[bool] | None = None, **config: object) -> SplitResult:
    splitter = Splitter(Split(**config))  # type: ignore[arg-type]
    batches = [batch_of(rows[i : i + 1_000]) for i in range(0, len(rows), 1_000)]
    sketches = MemorySketches([splitter.sketch(batch) for batch in batches])
    corpus = MemoryCorpus(batches, foreign or ())
    return splitter.split(corpus, sketches, "test set" if foreign else None)


def sides_of(rows: list[Row], **config: object) -> list[str]:
    return [SIDES[side] for side in split(rows, **config).sides]


def near(text: str) -> str:
    """The same text with one word changed at its end."""
    return f"{text} changed"


LONG = [" ".join(f"w{number}x{word}" for word in range(60)) for number in range(400)]


@settings(max_examples=40, deadline=None)
@given(TEXTS, SHARES)
def test_both_sides_get_rows_and_no_group_straddles(texts: list[str], share: float) -> None:
    rows = documents(texts)
    if len({group_key(row) for row in rows}) < 2:
        with pytest.raises(DataError, match="cannot keep rows away from training"):
            sides_of(rows, validation=share)
        return
    sides = sides_of(rows, validation=share)
    assert set(sides) == {"train", "validation"}
    of_group: dict[str, set[str]] = {}
    for row, side in zip(rows, sides, strict=True):
        of_group.setdefault(group_key(row), set()).add(side)
    assert all(len(sides_of_group) == 1 for sides_of_group in of_group.values())


@settings(max_examples=10, deadline=None)
@given(TEXTS, SHARES)
def test_adding_and_reordering_rows_moves_none(more: list[str], share: float) -> None:
    # Enough rows that neither side is empty by chance, whatever is added.
    base = [f"base {number}" for number in range(1_000)]
    before = dict(zip(base, sides_of(documents(base), validation=share), strict=True))
    everything = more + base[::-1]
    after = dict(zip(everything, sides_of(documents(everything), validation=share), strict=True))
    assert {text: after[text] for text in base} == before


@pytest.mark.parametrize(("validation", "test"), [(0.05, 0.0), (0.1, 0.2), (0.5, 0.3)])
def test_shares_are_as_asked(validation: float, test: float) -> None:
    sides = sides_of(documents([str(n) for n in range(4_000)]), validation=validation, test=test)
    assert sides.count("validation") / 4_000 == pytest.approx(validation, abs=0.02)
    assert sides.count("test") / 4_000 == pytest.approx(test, abs=0.02)


def test_each_side_gets_a_row_of_a_small_dataset() -> None:
    for number in range(30):
        rows = documents([f"{number} {word}" for word in ("one", "two", "three")])
        assert set(sides_of(rows, validation=0.01, test=0.01)) == set(SIDES)
    with pytest.raises(
        DataError, match="2 rows with 2 different prompts; there must be at least 3"
    ):
        sides_of(documents(["a", "b"]), validation=0.1, test=0.1)


def test_near_duplicates_stay_together_unless_switched_off() -> None:
    rows = documents([*LONG, *map(near, LONG)])
    sides = sides_of(rows, validation=0.5)
    assert sides[: len(LONG)] == sides[len(LONG) :]
    apart = sides_of(rows, validation=0.5, near_duplicates=None)
    assert apart[: len(LONG)] != apart[len(LONG) :]


def test_a_chain_of_near_duplicates_stays_together() -> None:
    words = [f"w{number}" for number in range(100)]
    chain = [" ".join([*words[step:], *(f"n{i}" for i in range(step))]) for step in range(0, 40, 4)]
    for number in range(5):
        rows = documents([*(f"{text} {number}" for text in chain), *LONG[:20]])
        sides = sides_of(rows, validation=0.5, near_duplicates=0.7)
        assert len(set(sides[: len(chain)])) == 1


def test_a_given_test_set_is_kept_whole_and_rows_that_repeat_it_go() -> None:
    given_rows = [LONG[0], LONG[1]]
    own = [near(LONG[0]), LONG[1], *LONG[2:40]]
    result = split(documents(given_rows + own), [True] * 2 + [False] * 40, validation=0.2)
    assert [SIDES[side] for side in result.sides[:2]] == ["test", "test"]
    assert result.drops.rows.tolist() == [2, 3]
    assert result.drops.kept.tolist() == [0, 1]
    assert {SIDES[side] for side in result.sides[4:]} == {"train", "validation"}


def test_a_leak_is_an_error_of_ours() -> None:
    splitter = Splitter(Split())
    keys = np.array([1, 2, 1], np.uint64)
    other = np.array([1, 2, 3], np.uint64)
    with pytest.raises(RuntimeError, match="one prompt on two sides"):
        splitter._assert_no_leak(np.array([0, 1, 1]), keys, other, other)


def test_same_prompt_is_one_group_whatever_follows() -> None:
    one = chat(1, "What is  NaN?", "A number.")
    two = Chat(
        id="x", file="b", row=2, messages=(*one.messages, *chat(2, "And inf?", "Too.").messages)
    )
    system = Message("system", "Be brief.")
    three = Chat(
        id="y", file="b", row=3, messages=(system, *chat(3, "what is nan?\n", "N.").messages)
    )
    pair = Preference(
        id="z",
        file="c",
        row=4,
        prompt=one.messages[:1],
        chosen=one.messages[1:],
        rejected=(Message("assistant", "Bread."),),
    )
    assert len({group_key(row) for row in (one, two, three, pair)}) == 1
    assert group_key(chat(1, "What is NaN", "A number.")) != group_key(one)


def test_rows_about_one_subject_stay_together() -> None:
    about = [chat(1, "What is it?", "x", "str.join"), chat(2, "How do I?", "y", "str.join")]
    assert group_key(about[0]) == group_key(about[1])
    assert group_key(about[0]) != group_key(chat(3, "What is it?", "x", "str.split"))
