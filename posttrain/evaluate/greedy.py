"""Greedy answers to many prompts, in batches of about the same length.

Importing this module imports torch and transformers: do it inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.evaluate.samples import end_tokens
from posttrain.train.rollout import (
    Answer,
    batches_by_length,
    make_batch,
    only_settings,
    read_answers,
    up_to_end,
)


def write_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """The likeliest token each time, to each prompt.

    Nothing of the model's own generation settings counts but the tokens that end an answer: a
    penalty for repetition would belong to whoever wrote the settings, not to the weights.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with a padding token.
        prompts: Token ids of each.
        max_new_tokens: Longest answer.
        batch_size: Prompts at once; the longest come first, so that memory runs out early if ever.
        tell: Told how many are answered, of how many.

    Returns:
        An answer to each prompt, in their order.
    """
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    written: dict[int, list[int]] = {}
    device = next(model.parameters()).device
    for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        # Padded on the left: every prompt ends where its answer begins.
        batch = make_batch(
            [prompts[row] for row in rows], [[]] * len(rows), tokenizer.pad_token_id, device
        )
        with torch.inference_mode(), only_settings(model, config):
            out = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                generation_config=config,
            )
        for row, ids in zip(rows, out[:, batch.input_ids.shape[1] :].tolist(), strict=True):
            written[row] = up_to_end(ids, ends)
        tell(len(written), len(prompts))
    return read_answers([written[row] for row in range(len(prompts))], ends, tokenizer)
