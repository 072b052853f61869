"""Prompts for stages that learn from answers which the model writes: what of a row is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


def prompt_of(row: Row) -> Messages:
    """The turns that an answer follows; none for a chat that begins with the assistant."""
    match row:
        case Document():
            return (Message("user", row.text),)
        case Chat():
            return row.messages[: _last_answer(row)]
        case Preference() | KtoExample():
            return row.prompt


def reference_of(row: Row) -> str | None:
    """The wanted answer of a row; None where it has none."""
    match row:
        case Document():
            return None
        case Chat():
            last = _last_answer(row)
            return row.messages[last].content if last < len(row.messages) else None
        case Preference():
            return row.chosen[-1].content
        case KtoExample():
            return row.completion[-1].content if row.label else None


def _last_answer(row: Chat) -> int:
    """Position of the last assistant turn; the number of turns if there is none."""
    turns = [turn for turn, message in enumerate(row.messages) if message.role == "assistant"]
    return turns[-1] if turns else len(row.messages)


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
