"""Answers that the model writes while it is trained, and the log-probabilities of their tokens.

Importing this module imports torch and transformers: do it inside functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from posttrain.evaluate.samples import end_tokens
from posttrain.recipe.online import Rollout


@dataclass(frozen=True)
class Answer:
    """What the model wrote to a prompt."""

    token_ids: list[int]
    """The token that ended it included; never empty."""
    text: str
    """Special tokens left out."""
    ended: bool
    """Whether the model ended it; False where it reached the longest length."""


class Rollouts(Protocol):
    """What writes answers with the model's present weights."""

    def write(self, prompts: Sequence[Sequence[int]], seed: int, first: int = 0) -> list[Answer]:
        """An answer to each prompt.

        The same prompts, seed and weights give the same answers, and torch's global generators
        stay as they were.

        Args:
            prompts: Token ids of each.
            seed: Another seed, other draws; not negative.
            first: Position of the first prompt among those that several processes share.
        """


def make_rollouts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rollout: Rollout
) -> Rollouts:
    """The backend that the recipe names.

    Raises:
        ModelError: it is not installed.
    """
    if rollout.backend == "vllm":
        from posttrain.train.vllm_rollouts import VllmRollouts

        return VllmRollouts(model, tokenizer, rollout)
    return TransformersRollouts(model, tokenizer, rollout)


@dataclass(frozen=True)
class Batch:
    """Prompts and answers side by side: [left padding, prompt, answer, right padding]."""

    input_ids: Tensor
    """int64 of shape [rows, prompt + answer]; every answer begins in the same column."""
    attention_mask: Tensor
    """Of the same shape; 0 on padding."""
    answer_mask: Tensor
    """bool of shape [rows, answer]."""

    @property
    def answers(self) -> Tensor:
        """Token ids of shape [rows, answer]."""
        return self.input_ids[:, -self.answer_mask.shape[1] :]

    def inputs(self) -> dict[str, Any]:
        """The model's arguments; their logits, less the last, are those that drew the answers."""
        # Positions count from each prompt's first token: what precedes it is no text. Computed
        # from the mask, log-probabilities do not depend on how far a row is padded.
        positions = (self.attention_mask.cumsum(1) - 1).clamp(min=0)
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": positions,
            "use_cache": False,
            "logits_to_keep": self.answer_mask.shape[1] + 1,
        }


def make_batch(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device | str = "cpu",
) -> Batch:
    """Pad prompts on the left and answers on the right, each to the longest."""
    before, after = max(map(len, prompts)), max(map(len, answers))
    ids = np.full((len(prompts), before + after), pad_token_id, np.int64)
    mask = np.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, before - len(prompt) : before + len(answer)] = [*prompt, *answer]
        mask[row, before - len(prompt) : before + len(answer)] = 1
    attention_mask = torch.from_numpy(mask).to(device)
    return Batch(
        torch.from_numpy(ids).to(device), attention_mask, attention_mask[:, before:].bool()
    )


def chosen_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of tokens under softmax(logits / temperature).

    Args:
        logits: Of shape [rows, answer, vocabulary].
        tokens: Of shape [rows, answer].
        temperature: Of the sampling: the policy is the distribution that was sampled from.

    Returns:
        float32 (of float64 logits float64) of shape [rows, answer].
    """
    # Huang et al. (2024), detail 4: logits are divided by the sampling temperature.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = wide if temperature == 1 else wide / temperature
    flat = functional.cross_entropy(scaled.flatten(0, 1), tokens.flatten(), reduction="none")
    return -flat.view(tokens.shape)


def answer_log_probs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    temperature: float,
    batch_size: int,
    pad_token_id: int,
) -> list[Tensor]:
    """Log-probability of each token of each answer, on temperature-scaled logits.

    Args:
        model: In evaluation mode, or without dropout.
        prompts: Token ids of each.
        answers: Token ids of each, none empty.
        temperature: Of the sampling.
        batch_size: Rows a pass, of about the same length; changes nothing but rounding.
        pad_token_id: Any token.

    Returns:
        float32 tensors on the CPU, each of shape [length of the answer].
    """
    found: dict[int, Tensor] = {}
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    for rows in batches_by_length(lengths, batch_size):
        batch = make_batch(
            [prompts[row] for row in rows],
            [answers[row] for row in rows],
            pad_token_id,
            next(model.parameters()).device,
        )
        with torch.no_grad():
            logits = model(**batch.inputs()).logits[:, :-1]
        scored = chosen_log_probs(logits, batch.answers, temperature).float().cpu()
        found |= {row: line[: len(answers[row])] for row, line in zip(rows, scored, strict=True)}
    return [found[row] for row in range(len(answers))]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Positions in batches of about the same length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


class TransformersRollouts:
    """Writes with transformers, in the process that trains, with a cache of keys and values."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rollout: Rollout
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._rollout = rollout
        self._ends = end_tokens(model, tokenizer)
        self._config = GenerationConfig(
            max_new_tokens=rollout.max_new_tokens,
            do_sample=False,  # what `_Draws` has drawn is the only token left to choose
            eos_token_id=self._ends or None,
            pad_token_id=tokenizer.pad_token_id,
        )

    def write(self, prompts: Sequence[Sequence[int]], seed: int, first: int = 0) -> list[Answer]:
        """See `Rollouts`. The draws depend on the seed and a prompt's position alone."""
        written: dict[int, list[int]] = {}
        was_training = self._model.training
        self._model.eval()
        for rows in batches_by_length([len(p) for p in prompts], self._rollout.batch_size):
            draws = [
                np.random.default_rng([seed, first + row]).random(self._rollout.max_new_tokens)
                for row in rows
            ]
            answers = self._generate([prompts[row] for row in rows], np.stack(draws))
            written |= dict(zip(rows, answers, strict=True))
        self._model.train(was_training)
        ids = [written[row] for row in range(len(prompts))]
        return read_answers(ids, self._ends, self._tokenizer)

    def _generate(self, prompts: list[Sequence[int]], draws: np.ndarray) -> list[list[int]]:
        """Token ids up to and with the first end, of each prompt."""
        device = next(self._model.parameters()).device
        # Detail 2: queries are padded on the left, so that each ends where its answer begins.
        batch = make_batch(prompts, [[]] * len(prompts), self._tokenizer.pad_token_id, device)
        uniform = torch.from_numpy(draws).to(device)
        with torch.inference_mode(), only_settings(self._model, self._config):
            out = self._model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                logits_processor=[
                    _Draws(uniform, batch.input_ids.shape[1], self._rollout.temperature)
                ],
            )
        rows: list[list[int]] = out[:, batch.input_ids.shape[1] :].tolist()
        return [up_to_end(row, self._ends) for row in rows]


class _Draws(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Draws the next tokens from softmax(logits / temperature), nothing cut off.

    By inversion: the token at which the cumulated probability passes a uniform number. A row has
    its numbers to itself, so what it draws does not depend on the rows beside it.
    """

    def __init__(self, uniform: Tensor, start: int, temperature: float) -> None:
        self._uniform = uniform
        self._start = start
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Make the drawn token's score the highest; scores are of shape [rows, vocabulary]."""
        cumulated = torch.softmax(scores / self._temperature, -1).cumsum(-1, dtype=torch.float64)
        step = input_ids.shape[1] - self._start
        passed = self._uniform[:, step : step + 1] * cumulated[:, -1:]
        drawn = torch.searchsorted(cumulated, passed, right=True).clamp(max=scores.shape[1] - 1)
        return scores.scatter(1, drawn, torch.inf)


@contextmanager
def only_settings(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put the config in the place of the model's own, which would fill in what it leaves open."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, causal.generation_config = causal.generation_config, config
    try:
        yield
    finally:
        causal.generation_config = own


def up_to_end(token_ids: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first that ends an answer, with it; what follows is padding."""
    for position, token in enumerate(token_ids):
        if token in ends:
            return token_ids[: position + 1]
    return token_ids


def read_answers(
    ids: list[list[int]], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Answer]:
    """Answers from the token ids of each."""
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [
        Answer(tokens, text, tokens[-1] in ends) for tokens, text in zip(ids, texts, strict=True)
    ]
