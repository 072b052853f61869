from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.prepared import PreparedDataset, write_dataset
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
ORIGIN = {
    # An id is 16 hex digits; validation rows of equal content are ordered by it.
    "id": st.text("0123456789abcdef", min_size=16, max_size=16),
    "file": TEXT,
    "row": st.integers(1, 2**40),
    "subject": st.none() | TEXT,
    "category": st.none() | TEXT,
    "date": st.none() | TEXT,
    "score": st.none() | st.floats(allow_nan=False),
}
ROWS: st.SearchStrategy[list[Row]] = st.one_of(
    st.lists(st.builds(Document, text=TEXT, **ORIGIN), max_size=5),
    st.lists(st.builds(Chat, messages=MESSAGES, **ORIGIN), max_size=5),
    st.lists(
        st.builds(
            Preference,
            prompt=MESSAGES,
            chosen=MESSAGES,
            rejected=MESSAGES,
            margin=st.none() | st.floats(0, allow_nan=False),
            **ORIGIN,
        ),
        max_size=5,
    ),
    st.lists(
        st.builds(KtoExample, prompt=MESSAGES, completion=MESSAGES, label=st.booleans(), **ORIGIN),
        max_size=5,
    ),
)


def write(folder: Path, train: list[Row], validation: list[Row]) -> PreparedDataset:
    family = family_of((train + validation)[0]) if train + validation else "documents"
    write_dataset(folder, family, {"train": train, "validation": validation})
    return PreparedDataset.open(folder)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_rows_survive_a_round_trip(rows: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = write(Path(folder), rows, rows)
        assert dataset.train() == rows
        assert sorted(dataset.validation(), key=repr) == sorted(rows, key=repr)
        assert dataset.sizes == {"train": len(rows), "validation": len(rows), "test": 0}


def test_limits_and_order(tmp_path: Path) -> None:
    rows: list[Row] = [
        Document(id=str(number), file="a", row=number, text=str(number)) for number in range(3_000)
    ]
    dataset = write(tmp_path / "one", rows, rows)
    assert dataset.train(limit=1_500) == rows[:1_500]
    digests = [content_digest(row) for row in dataset.validation()]
    assert digests == sorted(digests)
    assert dataset.validation(limit=5) == dataset.validation()[:5]
    reordered = write(tmp_path / "two", rows, rows[::-1])
    assert reordered.validation(limit=5) == dataset.validation(limit=5)


def test_a_finished_model_is_measured_on_the_test_rows_if_there_are_any(tmp_path: Path) -> None:
    rows: list[Row] = [Document(id=str(n), file="a", row=n, text=str(n)) for n in range(3)]
    sides = {"train": rows[:1], "validation": rows[1:2], "test": rows[2:]}
    write_dataset(tmp_path / "with", "documents", sides)  # type: ignore[arg-type]
    assert PreparedDataset.open(tmp_path / "with").unseen() == rows[2:]
    assert write(tmp_path / "without", rows[:1], rows[1:2]).unseen(1) == rows[1:2]


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
