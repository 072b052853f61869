from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from posttrain.data.rows import Document
from posttrain.train.history import Step
from posttrain.train.rows import Encodings, count_passes, write_row_account
from posttrain.train.tables import TrainingTable, make_table
from posttrain.train.tokenize import IGNORED, Encoded


def encoded(tokens: int, trained: int | None = None, cut: int = 0) -> Encoded:
    labels = [IGNORED, *range(tokens - 1)]
    if trained is not None:
        labels = [IGNORED] * (tokens - trained) + list(range(trained))
    return Encoded(list(range(tokens)), labels, cut)


def table_of(rows: list[Encoded], batch_size: int) -> TrainingTable:
    return make_table(rows, 1000, packing=False, multiple_of=batch_size, filler_id=0)


def loader(size: int, batch_size: int, seed: int = 3, *, seedable: bool = True) -> DataLoader[int]:
    """What a trainer reads from: positions as rows, shuffled as a trainer shuffles."""
    settings = DataLoaderConfiguration(use_seedable_sampler=seedable, data_seed=seed)
    accelerator = Accelerator(cpu=True, dataloader_config=settings)
    plain: DataLoader[int] = DataLoader(range(size), batch_size, shuffle=True)  # type: ignore[arg-type]
    return accelerator.prepare_data_loader(plain, device_placement=False)  # type: ignore[no-any-return]


def read(
    rows: list[Encoded], batch_size: int, epochs: int, last: int, seed: int = 3
) -> tuple[list[Step], np.ndarray]:
    """Really read the rows: the steps, and how often each was read in the first `last`."""
    size = len(rows) + -len(rows) % batch_size
    filled = [*rows, *[Encoded([0], [IGNORED])] * (size - len(rows))]
    steps: list[Step] = []
    passes = np.zeros(size, int)
    batches = loader(size, batch_size, seed)
    for epoch in range(epochs):
        batches.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in batches:
            sequences = [filled[position] for position in batch.tolist()]
            tokens = sum(len(row.input_ids) for row in sequences)
            trained = sum(row.trainable for row in sequences)
            if len(steps) < last:
                passes[batch.numpy()] += 1
            steps.append(Step(len(steps) + 1, 0.0, 0.0, 0.0, tokens, trained))
    return steps, passes[: len(rows)]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(2, 50), min_size=1, max_size=20),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 99),
)
def test_passes_are_those_of_a_run_that_reads_the_rows(
    lengths: list[int], batch_size: int, epochs: int, last: int
) -> None:
    rows = [encoded(length) for length in lengths]
    steps, expected = read(rows, batch_size, epochs, last)
    last = min(last, len(steps))
    size = len(rows) + -len(rows) % batch_size
    table = table_of(rows, batch_size)
    counted = count_passes(loader(size, batch_size), table, batch_size, steps, last)
    assert counted is not None
    assert counted[: len(rows)].tolist() == expected.tolist()


def test_an_order_that_does_not_fit_the_counted_tokens_is_no_answer() -> None:
    rows = [encoded(length) for length in range(2, 18)]
    steps, _ = read(rows, batch_size=4, epochs=1, last=4, seed=8)
    assert count_passes(loader(16, 4, seed=8), table_of(rows, 4), 4, steps, 4) is not None
    assert count_passes(loader(16, 4, seed=9), table_of(rows, 4), 4, steps, 4) is None


def test_an_order_that_a_seed_alone_does_not_give_is_no_answer() -> None:
    rows = [encoded(5)] * 4
    steps, _ = read(rows, batch_size=4, epochs=1, last=1)
    assert count_passes(loader(4, 4, seedable=False), table_of(rows, 4), 4, steps, 1) is None


ROWS = [Document(id=f"{n:016}", file="a.txt", row=n, text="") for n in range(4)]
ENCODINGS = Encodings([encoded(5), encoded(6, trained=0), encoded(7, cut=2), encoded(8)])


TABLE = table_of(ENCODINGS.every, batch_size=1)


def account(folder: Path, passes: np.ndarray | None) -> dict[str, list[object]]:
    write_row_account(folder / "rows.parquet", ROWS, ENCODINGS, TABLE, passes)
    columns: dict[str, list[object]] = pq.read_table(folder / "rows.parquet").to_pydict()
    return columns


def test_the_account_has_a_line_for_every_row_in_their_order(tmp_path: Path) -> None:
    assert account(tmp_path, np.array([2, 0, 1])) == {
        "id": [row.id for row in ROWS],
        "verdict": ["trained", "left out", "not read", "trained"],
        "tokens": [5, 6, 7, 8],
        "cut": [0, 0, 2, 0],
        "position": [0, None, 1, 2],
        "passes": [2, 0, 0, 1],
    }


def test_unknown_passes_are_null(tmp_path: Path) -> None:
    columns = account(tmp_path, None)
    assert columns["passes"] == [None, 0, None, None]
    assert columns["verdict"] == ["trained", "left out", "trained", "trained"]


def test_a_row_in_several_blocks_was_read_as_often_as_the_block_that_was_read_least(
    tmp_path: Path,
) -> None:
    rows = [ROWS[0]]
    encodings = Encodings([Encoded(list(range(25)), list(range(25)))])
    table = make_table(encodings.every, 10, packing=False, multiple_of=1, filler_id=0)
    for read, passes, verdict in (([2, 1, 1], 1, "trained"), ([1, 0, 0], 0, "trained")):
        write_row_account(tmp_path / "a.parquet", rows, encodings, table, np.array(read))
        line = pq.read_table(tmp_path / "a.parquet").to_pylist()[0]
        assert (line["passes"], line["verdict"], line["position"]) == (passes, verdict, 0)


def test_equal_rows_leave_an_equal_account(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_row_account(tmp_path / name, ROWS, ENCODINGS, TABLE, np.array([1, 1, 1]))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("trained", [0, 3])
def test_only_rows_with_a_token_to_train_on_are_read(trained: int) -> None:
    encodings = Encodings([encoded(5, trained), encoded(4)])
    assert encodings.untrainable == (trained == 0)
    assert len(encodings.rows) == 1 + (trained > 0)
