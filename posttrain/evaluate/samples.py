"""Greedy answers to a few held-out prompts: no measure, but what a person looks at first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.data.rows import Chat, Document

DOCUMENT_PROMPT_CHARACTERS = 200
"""Beginning of a document that the model is asked to go on from."""


class Sample(BaseModel):
    """One answered prompt, as in `samples.json`."""

    model_config = ConfigDict(frozen=True)

    id: str
    """Id of the held-out row."""
    prompt: str
    """The last thing said before the answer, or the beginning of a document."""
    answer: str
    """What the model says."""
    reference: str
    """What the row says."""


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Chat | Document],
    max_new_tokens: int,
) -> list[Sample]:
    """Answer the last assistant turn of each chat, or go on with each document, all in one batch.

    Greedy, so that the same model gives the same answers; padded on the left, so that every prompt
    ends where its answer begins.
    """
    import torch
    from transformers import GenerationConfig

    if not rows:
        return []
    parts = [_split(tokenizer, row) for row in rows]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        batch = tokenizer(
            [text for _, text, _ in parts],
            # A chat template writes its special tokens itself.
            add_special_tokens=not hasattr(rows[0], "messages"),
            padding=True,
            return_tensors="pt",
        )
    finally:
        tokenizer.padding_side = side
    # The model's own generation settings ask for sampling; these replace them as a whole.
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    device = next(model.parameters()).device
    with torch.inference_mode():
        written = model.generate(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            generation_config=greedy,
        )
    answers = tokenizer.batch_decode(
        written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [
        Sample(id=row.id, prompt=prompt, answer=answer.strip(), reference=reference)
        for row, (prompt, _, reference), answer in zip(rows, parts, answers, strict=True)
    ]


def _split(tokenizer: PreTrainedTokenizerBase, row: Chat | Document) -> tuple[str, str, str]:
    """What is shown as the prompt, the text the model reads, and the reference."""
    if not hasattr(row, "messages"):
        start, rest = row.text[:DOCUMENT_PROMPT_CHARACTERS], row.text[DOCUMENT_PROMPT_CHARACTERS:]
        return start, start, rest[:DOCUMENT_PROMPT_CHARACTERS]
    last = max(i for i, message in enumerate(row.messages) if message.role == "assistant")
    before = [{"role": turn.role, "content": turn.content} for turn in row.messages[:last]]
    text = str(tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
    shown = before[-1]["content"] if before else ""
    return shown, text, row.messages[last].content


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the model may know more than the tokenizer names."""
    known = model.generation_config.eos_token_id if model.generation_config else None
    ends = known if isinstance(known, list) else [known]
    return sorted({int(end) for end in [*ends, tokenizer.eos_token_id] if end is not None})
