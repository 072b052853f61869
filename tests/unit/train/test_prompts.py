from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from posttrain.data.rows import Chat, Document, KtoExample, Message, Messages, Preference, Row
from posttrain.errors import ModelError
from posttrain.train.prompts import (
    encode_prompts,
    prompt_of,
    prompt_order,
    reference_of,
    write_prompt_account,
)

ORIGIN = {"id": "0123456789abcdef", "file": "a.jsonl", "row": 7}
SYSTEM, ASK, MORE = Message("system", "S"), Message("user", "Q"), Message("user", "More?")
GOOD, BAD = Message("assistant", "good"), Message("assistant", "bad")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize(
    ("row", "asked", "reference"),
    [
        (Chat(messages=(SYSTEM, ASK, GOOD), **ORIGIN), (SYSTEM, ASK), "good"),
        (Chat(messages=(ASK, BAD, MORE, GOOD), **ORIGIN), (ASK, BAD, MORE), "good"),
        (Chat(messages=(ASK, BAD, MORE), **ORIGIN), (ASK, BAD, MORE), None),
        (Chat(messages=(GOOD,), **ORIGIN), (), "good"),
        (Preference(prompt=(ASK,), chosen=(GOOD,), rejected=(BAD,), **ORIGIN), (ASK,), "good"),
        (KtoExample(prompt=(ASK,), completion=(GOOD,), label=True, **ORIGIN), (ASK,), "good"),
        (KtoExample(prompt=(ASK,), completion=(BAD,), label=False, **ORIGIN), (ASK,), None),
        (Document(text="Once upon", **ORIGIN), (Message("user", "Once upon"),), None),
    ],
)
def test_what_is_asked_and_what_was_wanted(
    row: Row, asked: Messages, reference: str | None
) -> None:
    assert prompt_of(row) == asked
    assert reference_of(row) == reference


def test_a_prompt_ends_where_the_answer_begins(tokenizer: PreTrainedTokenizerBase) -> None:
    [prompt] = encode_prompts(tokenizer, [Chat(messages=(SYSTEM, ASK, GOOD), **ORIGIN)], 99)
    assert prompt is not None
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt.input_ids) == text
    assert prompt.input_ids[0] == tokenizer.bos_token_id
    assert prompt.input_ids[1] != tokenizer.bos_token_id, "the template's own, and only that one"


def test_a_document_is_asked_as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    [prompt] = encode_prompts(tokenizer, [Document(text="Once upon", **ORIGIN)], 99)
    assert prompt is not None
    assert tokenizer.decode(prompt.input_ids) == "Once upon"


def test_prompts_that_are_too_long_or_missing_are_left_out(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows: list[Row] = [
        Chat(messages=(ASK, GOOD), **ORIGIN),
        Chat(messages=(GOOD,), **ORIGIN),
        Document(text="a b c d e f g h i j k l m n o p", **ORIGIN),
        Document(text="", **ORIGIN),
    ]
    length = len(
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True
            )
        )["input_ids"]
    )
    found = encode_prompts(tokenizer, rows, length)
    assert [prompt is not None for prompt in found] == [True, False, False, False]
    assert encode_prompts(tokenizer, rows[:1], length - 1) == [None]


def test_a_model_without_a_chat_template_is_told_the_row(tiny_model: Path) -> None:
    plain = AutoTokenizer.from_pretrained(tiny_model)
    plain.chat_template = None
    with pytest.raises(ModelError, match=r"a.jsonl:7: "):
        encode_prompts(plain, [Chat(messages=(ASK, GOOD), **ORIGIN)], 99)
    assert encode_prompts(plain, [Document(text="Once", **ORIGIN)], 99) != [None]


def test_every_prompt_is_asked_once_a_pass_in_an_order_of_the_pass() -> None:
    order = prompt_order(5, 13, seed=3)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert len(set(order[10:])) == 3
    assert order[:5].tolist() != order[5:10].tolist()
    assert prompt_order(5, 7, seed=3).tolist() == order[:7].tolist(), "a beginning of it"
    assert prompt_order(5, 13, seed=4).tolist() != order.tolist()
    assert prompt_order(5, 0, seed=3).tolist() == []


def test_the_account_says_of_every_row_what_became_of_it(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows: list[Row] = [
        Document(text="one", **ORIGIN),
        Document(text="much longer than one", **ORIGIN),
        Document(text="two", **ORIGIN),
    ]
    prompts = encode_prompts(tokenizer, rows, 3)
    assert prompts[1] is None
    write_prompt_account(tmp_path / "rows.parquet", rows, prompts, np.array([2, 0]))
    account = pq.read_table(tmp_path / "rows.parquet").to_pydict()
    first, last = (len(tokenizer(text)["input_ids"]) for text in ("one", "two"))
    assert account == {
        "id": [ORIGIN["id"]] * 3,
        "verdict": ["trained", "left out", "not read"],
        "tokens": [first, None, last],
        "position": [0, None, 1],
        "passes": [2, 0, 0],
    }
    write_prompt_account(tmp_path / "rows.parquet", rows, prompts, None)
    unknown = pq.read_table(tmp_path / "rows.parquet").to_pydict()
    assert unknown["passes"] == [None, 0, None]
    assert unknown["verdict"] == ["trained", "left out", "trained"]
