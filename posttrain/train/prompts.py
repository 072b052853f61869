"""Prompts for stages that learn from answers which the model writes: what of a row is asked.

Such a stage accounts for its rows in `rows.parquet`, as every training stage does, one line a row
of the dataset's training side:

    id        the row's id, as in the dataset's ledger
    verdict   trained; not read: never asked on the way to the saved weights; left out: it has no
              prompt, or one that is longer than `rollout.max_prompt_tokens`
    tokens    tokens of the prompt; null for a row left out
    position  the prompt's place among those that can be asked, from 0; null for a row left out
    passes    how often it was asked, whatever the number of answers each time, on the way to the
              saved weights; null where that is not known
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.rows import Chat, Document, KtoExample, Message, Messages, Preference, Row
from posttrain.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """What the model is asked, as turns and as tokens."""

    row: Row
    messages: Messages
    """Turns up to the one that is to be answered; of a document its text as one user turn."""
    input_ids: list[int]
    """As the chat template writes them, up to where the answer begins; a document's as they are."""
    reference: str | None
    """The answer that the row has, if it has one that is wanted: for reward functions."""


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_tokens: int
) -> list[Prompt | None]:
    """The prompt of each row, None for one that has no prompt or a longer one than `max_tokens`.

    Raises:
        ModelError: the chat template is missing or cannot write a prompt; it says where the row is.
    """
    prompts: list[Prompt | None] = []
    for row in rows:
        messages = prompt_of(row)
        ids = _encode(tokenizer, row, messages)
        short = bool(messages) and 0 < len(ids) <= max_tokens
        prompts.append(Prompt(row, messages, ids, reference_of(row)) if short else None)
    return prompts


def prompt_order(count: int, asked: int, seed: int) -> np.ndarray:
    """Which prompt is asked when: one pass over all after another, each in an order of its own.

    Args:
        count: Prompts there are.
        asked: Prompts that are asked; a smaller number gives the beginning of the same order.
        seed: Of the orders.

    Returns:
        int64 of shape (asked,): positions among the prompts.
    """
    draw = np.random.default_rng(seed)
    passes = [draw.permutation(count) for _ in range(-(-asked // count))]
    return np.concatenate([np.empty(0, np.int64), *passes])[:asked]


def write_prompt_account(
    path: Path, rows: Sequence[Row], prompts: Sequence[Prompt | None], asked: np.ndarray | None
) -> None:
    """Leave the account of the training rows; its columns stand at the head of this module.

    Args:
        path: File to write.
        rows: The training side of the dataset, all of it.
        prompts: From `encode_prompts`.
        asked: How often each prompt that is not None was asked, int64; None where not known.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    there = np.array([prompt is not None for prompt in prompts], bool)
    passes = np.zeros(len(rows), np.int64)
    passes[there] = 1 if asked is None else asked
    verdict = np.where(there, np.where(passes > 0, "trained", "not read"), "left out")
    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "verdict": pa.array(verdict.astype(object), pa.string()),
        "tokens": pa.array([p and len(p.input_ids) for p in prompts], pa.int64()),
        "position": pa.array(np.cumsum(there) - 1, pa.int64(), mask=~there),
        "passes": pa.array(passes, pa.int64(), mask=there if asked is None else None),
    }
    pq.write_table(pa.table(columns), path, compression="zstd", version="2.6")


def prompt_of(row: Row) -> Messages:
    """The turns that an answer follows; none for a chat that is one turn of the assistant's.

    Of a chat that ends with the assistant that is all before its last turn; any other chat waits
    for an answer as a whole.
    """
    match row:
        case Document():
            return (Message("user", row.text),)
        case Chat():
            return row.messages[:-1] if _answered(row) else row.messages
        case Preference() | KtoExample():
            return row.prompt


def reference_of(row: Row) -> str | None:
    """The wanted answer of a row; None where it has none."""
    match row:
        case Document():
            return None
        case Chat():
            return row.messages[-1].content if _answered(row) else None
        case Preference():
            return _first_answer(row.chosen)
        case KtoExample():
            return _first_answer(row.completion) if row.label else None


def _answered(row: Chat) -> bool:
    return bool(row.messages) and row.messages[-1].role == "assistant"


def _first_answer(messages: Messages) -> str:
    return next(message.content for message in messages if message.role == "assistant")


def _encode(tokenizer: PreTrainedTokenizerBase, row: Row, messages: Messages) -> list[int]:
    from posttrain.train.tokenize import render_chat

    if isinstance(row, Document):
        ids: list[int] = tokenizer(row.text)["input_ids"]
        # The end of a sequence would be the end of the answer as well.
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    if not messages:
        return []
    try:
        text = render_chat(tokenizer, messages, add_generation_prompt=True)
    except ModelError as error:
        raise ModelError(f"{row.file}:{row.row}: {error}") from error
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
