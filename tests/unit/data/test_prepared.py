from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.prepared import Counts, LedgerLine, PreparedDataset, write_prepared
from posttrain.data.rows import (
    Chat,
    Document,
    KtoExample,
    Message,
    Preference,
    Row,
    content_digest,
    family_of,
)
from posttrain.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
MESSAGES = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), TEXT), max_size=3
).map(tuple)
ORIGIN = {"id": TEXT, "file": TEXT, "row": st.integers(1, 2**40), "subject": st.none() | TEXT}
ROWS: st.SearchStrategy[list[Row]] = st.one_of(
    st.lists(st.builds(Document, text=TEXT, **ORIGIN), max_size=5),
    st.lists(st.builds(Chat, messages=MESSAGES, **ORIGIN), max_size=5),
    st.lists(
        st.builds(Preference, prompt=MESSAGES, chosen=MESSAGES, rejected=MESSAGES, **ORIGIN),
        max_size=5,
    ),
    st.lists(
        st.builds(KtoExample, prompt=MESSAGES, completion=MESSAGES, label=st.booleans(), **ORIGIN),
        max_size=5,
    ),
)
LINE = LedgerLine("x", "a.jsonl", 7, "drop", "length", "too long", "9 > 8", "train", None)


def write(folder: Path, train: list[Row], held_out: list[Row]) -> PreparedDataset:
    counts = Counts(
        rows_in=len(train) + len(held_out) + 1,
        train=len(train),
        held_out=len(held_out),
        bad=0,
        dropped={"length": {"too long": 1}},
    )
    family = family_of((train + held_out)[0]) if train + held_out else "documents"
    write_prepared(folder, family, counts, train, held_out, [LINE])
    return PreparedDataset.open(folder)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_rows_survive_a_round_trip(rows: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = write(Path(folder), rows, rows)
        assert dataset.train() == rows
        assert sorted(dataset.held_out(), key=repr) == sorted(rows, key=repr)
        assert dataset.ledger() == [LINE]
        assert dataset.counts.rows_dropped == 1


def test_limits_and_order(tmp_path: Path) -> None:
    rows: list[Row] = [
        Document(id=str(number), file="a", row=number, text=str(number)) for number in range(3_000)
    ]
    dataset = write(tmp_path / "one", rows, rows)
    assert dataset.train(limit=1_500) == rows[:1_500]
    digests = [content_digest(row) for row in dataset.held_out()]
    assert digests == sorted(digests)
    assert dataset.held_out(limit=5) == dataset.held_out()[:5]
    reordered = write(tmp_path / "two", rows, rows[::-1])
    assert reordered.held_out(limit=5) == dataset.held_out(limit=5)


def test_content_digest_is_about_content_alone() -> None:
    one = Document(id="1", file="a", row=1, text="x")
    assert content_digest(one) == content_digest(Document(id="2", file="b", row=2, text="x"))
    assert content_digest(one) != content_digest(Document(id="1", file="a", row=1, text="y"))


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a prepared dataset"):
        PreparedDataset.open(tmp_path)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="not a prepared dataset"):
        PreparedDataset.open(tmp_path)
