from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from posttrain.train.attention import BY_ROW, separate_rows
from posttrain.train.tables import held_out_table, make_table, pieces_of
from posttrain.train.tokenize import IGNORED, Encoded


def a_row(length: int, prompt: int = 0, first: int = 10) -> Encoded:
    ids = list(range(first, first + length))
    return Encoded(ids, [IGNORED] * prompt + ids[prompt:])


ROWS = st.lists(
    st.tuples(st.integers(1, 70), st.integers(0, 5)).map(lambda row: a_row(row[0], min(row))),
    min_size=1,
    max_size=30,
).filter(lambda rows: any(row.trainable for row in rows))


@settings(deadline=None, max_examples=60)
@given(ROWS, st.integers(8, 40))
def test_packing_keeps_every_token_of_every_row_in_blocks_of_bounded_length(
    rows: list[Encoded], max_length: int
) -> None:
    table = make_table(rows, max_length, packing=True, multiple_of=4, filler_id=0)
    assert len(table) % 4 == 0
    assert table.tokens.max() <= max_length
    pieces = sorted(
        (tuple(piece.input_ids), tuple(piece.labels)) for piece in pieces_of(rows, max_length)
    )
    found = []
    for entry, lengths in zip(table.dataset, table.dataset["seq_lengths"], strict=True):
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends, strict=True):
            ids, labels = entry["input_ids"][start:end], entry["labels"][start:end]
            if labels != [IGNORED]:
                found.append((tuple(ids), tuple(labels)))
    assert sorted(found) == pieces
    for row, encoded in enumerate(rows):
        held = [entry for entry, members in enumerate(table.rows) if row in members]
        assert bool(held) == bool(encoded.trainable)


def test_blocks_are_filled_best_fit_first() -> None:
    rows = [a_row(length) for length in (30, 20, 12, 10, 8)]
    table = make_table(rows, 40, packing=True, multiple_of=1, filler_id=0)
    assert sorted(table.tokens.tolist()) == [40, 40]


def test_a_long_document_goes_on_in_a_sequence_of_its_own() -> None:
    table = make_table([a_row(25)], 10, packing=False, multiple_of=2, filler_id=0)
    assert table.tokens.tolist() == [10, 10, 5, 1]
    assert table.rows == [[0], [0], [0], []]
    assert table.trained.tolist() == [9, 9, 4, 0], "nothing predicts a sequence's first token"


def test_held_out_rows_are_never_packed_and_know_their_task() -> None:
    table, tasks = held_out_table([[a_row(5), a_row(6)], [a_row(7)]], 10, 2, filler_id=0)
    assert table.rows == [[0], [1], [2], []]
    assert tasks == [0, 0, 1]


@pytest.fixture
def blocks(tiny_model: Path) -> tuple[Path, list[list[int]], dict[str, torch.Tensor]]:
    """Three texts, and the batch in which they share two blocks."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ["The door is red.", "Why do boats have lamps at night?", "Leaves."]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    rows = [Encoded(row, list(row)) for row in ids]
    longest = max(map(len, ids)) + len(ids[2])
    table = make_table(rows, longest, packing=True, multiple_of=1, filler_id=0)
    assert len(table) == 2, "one block holds two of the texts"
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return tiny_model, ids, collator(list(table.dataset))


@pytest.mark.parametrize("by_row", [True, False])
def test_the_logits_of_a_packed_document_are_those_of_the_document_alone(
    blocks: tuple[Path, list[list[int]], dict[str, torch.Tensor]], by_row: bool
) -> None:
    folder, ids, batch = blocks
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if by_row:
        separate_rows(model)
        assert model.config._attn_implementation == BY_ROW
    with torch.no_grad():
        read = {name: value for name, value in batch.items() if name != "labels"}
        packed = model(**read, use_cache=False).logits[0]
        alone = [model(torch.tensor([row])).logits[0] for row in ids]
    flat = batch["input_ids"][0].tolist()
    for row, logits in zip(ids, alone, strict=True):
        start = next(i for i in range(len(flat)) if flat[i : i + len(row)] == row)
        torch.testing.assert_close(packed[start : start + len(row)], logits, atol=1e-5, rtol=1e-5)


def test_attention_by_row_still_generates_and_pads(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, padding_side="left")
    batch = tokenizer(["The door", "Why do boats have lamps"], padding=True, return_tensors="pt")
    usual = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    ours = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    separate_rows(ours)
    said = [model.generate(**batch, max_new_tokens=8, do_sample=False) for model in (usual, ours)]
    assert torch.equal(*said)


def test_a_model_with_sliding_windows_keeps_its_own_attention(tiny_model: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=4,
        )
    )
    separate_rows(model)
    assert model.config._attn_implementation == "sdpa"
