"""How long the training rows are, in tokens, without tokenizing all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.prepared import PreparedDataset, read_batches
from posttrain.estimate.activations import Pass
from posttrain.recipe.base import RowFamily

if TYPE_CHECKING:
    import pyarrow as pa

BYTES_A_TOKEN = 4.0
"""UTF-8 bytes of a token of English text, where no tokenizer was asked."""
TOKENS_A_TURN = 6
"""What a chat template writes around a turn: the usual markers of role, start and end."""
BYTES_A_ROW = 1_000
"""Bytes of a row, where only the size of the source is known and rows are no lines."""
_SAMPLE = 200
"""Rows that a tokenizer is asked about."""
_SEQUENCES: dict[RowFamily, tuple[tuple[str, ...], ...]] = {
    "documents": (("text",),),
    "chats": (("messages",),),
    "preferences": (("prompt", "chosen"), ("prompt", "rejected")),
    "kto": (("prompt", "completion"),),
}
"""The sequences of a row, each by the columns that it is made of."""


@dataclass(frozen=True)
class RowLengths:
    """Tokens of each training row, before anything is cut."""

    tokens: np.ndarray
    """int64 of shape (rows,)."""
    basis: str
    """What they were taken from, for people."""
    counted: bool = True
    """Whether their number means anything; else only their length does."""


@dataclass(frozen=True)
class Layout:
    """Rows as the trainer reads them."""

    entries: int
    """Rows, or blocks with packing."""
    tokens: int
    """Of one epoch, without padding."""
    mean_length: float
    """Length of the row that a token stands in, on average over tokens."""
    widest: Pass
    """The pass with the most tokens."""


def lay_out(
    lengths: RowLengths,
    max_length: int,
    packing: bool,
    micro_batch_size: int,
    flat: bool,
    cut: bool,
) -> Layout:
    """What becomes of rows in training, as `posttrain.train.tables` does it.

    Args:
        lengths: Of the rows.
        max_length: Longest sequence, and length of a block.
        packing: Several rows a block.
        micro_batch_size: Rows or blocks a pass.
        flat: Rows of a pass lie end to end.
        cut: Longer rows are cut; else they go on in pieces of their own.
    """
    rows = np.minimum(lengths.tokens, max_length) if cut else _pieces(lengths.tokens, max_length)
    rows = np.sort(rows[rows > 0])[::-1] if len(rows) else np.array([max_length], np.int64)
    total, longest = int(rows.sum()), int(rows[0])
    mean = float((rows * rows).sum() / total)
    if packing:
        blocks = math.ceil(total / max_length)
        widest = Pass(min(blocks, micro_batch_size) * max_length, longest, flat=True)
        return Layout(blocks, total, mean, widest)
    first = rows[:micro_batch_size]
    tokens = int(first.sum()) if flat else len(first) * longest
    padded = not flat and len(first) > 1 and bool((rows != longest).any())
    return Layout(len(rows), total, mean, Pass(tokens, longest, flat, padded))


def lengths_of_dataset(folder: Path, model: Path | None) -> RowLengths:
    """Row lengths of a prepared dataset: bytes, turned into tokens by a sample of its rows.

    Args:
        folder: The dataset.
        model: A folder with a tokenizer.json, or None.

    Raises:
        DataError: it is no prepared dataset.
    """
    dataset = PreparedDataset.open(folder)
    sequences = _SEQUENCES[dataset.family]
    columns = list(dict.fromkeys(name for sequence in sequences for name in sequence))
    sizes: list[np.ndarray] = []
    turns: list[np.ndarray] = []
    sample: list[str] = []
    for batch in read_batches(folder / "train.parquet", columns):
        parts = {name: _bytes_and_turns(batch.column(name)) for name in columns}
        for names in sequences:
            sizes.append(np.sum([parts[name][0] for name in names], axis=0))
            turns.append(np.sum([parts[name][1] for name in names], axis=0))
        for _, _, texts in parts.values():
            sample += texts[: max(0, _SAMPLE - len(sample))]
    if not sizes:
        return RowLengths(np.zeros(0, np.int64), "an empty dataset")
    ratio, basis = _bytes_a_token(sample, model)
    tokens = np.concatenate(sizes) / ratio + TOKENS_A_TURN * np.concatenate(turns)
    return RowLengths(
        np.ceil(tokens).astype(np.int64), f"the rows of the prepared dataset, {basis}"
    )


def lengths_of_files(files: Sequence[Path], limit: int | None) -> RowLengths:
    """A guess from the size of source files: lines are rows, and all rows are equally long."""
    size = sum(file.stat().st_size for file in files)
    lines = sum(_count_lines(file) for file in files if file.suffix in (".jsonl", ".csv", ".tsv"))
    rows = max(1, lines or size // BYTES_A_ROW)
    mean = size / rows / BYTES_A_TOKEN
    tokens = np.full(min(rows, limit or rows), max(1, round(mean)), np.int64)
    return RowLengths(tokens, f"a guess from {size / 1e6:,.1f} MB of source files")


def unknown_lengths(max_length: int) -> RowLengths:
    """Nothing is known yet: the longest rows there may be, for memory alone."""
    longest = np.full(64, max_length, np.int64)
    return RowLengths(longest, "not known yet; memory is for the longest allowed", counted=False)


def _pieces(tokens: np.ndarray, max_length: int) -> np.ndarray:
    whole = np.full(int((tokens // max_length).sum()), max_length, np.int64)
    rest = tokens % max_length
    return np.concatenate([whole, rest[rest > 0]])


def _bytes_and_turns(column: pa.Array) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Bytes of text and turns of each row of a batch, and the texts of the first ones."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(column.type):
        return (
            _numbers(pc.binary_length(column)),
            np.zeros(len(column)),
            column[:_SAMPLE].to_pylist(),
        )
    contents = column.flatten().field("content")
    per_turn = _numbers(pc.binary_length(contents))
    turns = _numbers(pc.list_value_length(column)).astype(np.int64)
    ends = np.cumsum(turns)
    total = np.concatenate([[0.0], np.cumsum(per_turn)])
    sizes = total[ends] - total[ends - turns]
    return sizes, turns, contents[: 2 * _SAMPLE].to_pylist()


def _numbers(array: pa.Array) -> np.ndarray:
    numbers: np.ndarray = array.to_numpy(zero_copy_only=False).astype(np.float64)
    finite: np.ndarray = np.nan_to_num(numbers)
    return finite


def _bytes_a_token(texts: Sequence[str], model: Path | None) -> tuple[float, str]:
    """Bytes a token of some texts, by the model's tokenizer where there is one."""
    file = None if model is None else model / "tokenizer.json"
    if file is None or not file.exists() or not texts:
        return BYTES_A_TOKEN, f"{BYTES_A_TOKEN:g} bytes a token"
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(file)).encode_batch(list(texts), add_special_tokens=False)
    tokens = sum(len(one.ids) for one in encoded)
    ratio = sum(len(text.encode()) for text in texts) / max(tokens, 1)
    return max(ratio, 0.25), f"{ratio:.1f} bytes a token by its tokenizer"


def _count_lines(file: Path) -> int:
    with file.open("rb") as opened:
        return sum(block.count(b"\n") for block in iter(lambda: opened.read(2**20), b""))
