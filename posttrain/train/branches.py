"""Several answers to one prompt in one row, so that the prompt is read once.

A row is [prompt without its last token, (last token, answer) for each answer]. Every token sees
those before it in its own branch and in the prompt, and its position is the one that it has where
the answer follows the prompt alone. So an answer's log-probabilities are those of that sequence.

Importing this module imports torch: do it inside functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

Entry = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A prompt of one token or more, and the answers to it."""

_TOLERANCE = 1e-2
"""Largest difference, in nats an answer, between one row and a row for each answer that is still
rounding: in 16 bits it is a hundred times what it is in 32."""


@dataclass(frozen=True)
class BranchedBatch:
    """Rows of branches, padded on the right."""

    input_ids: Tensor
    """int64 of shape [rows, tokens], as the next three."""
    position_ids: Tensor
    labels: Tensor
    """-100 wherever no token of an answer stands."""
    branch: Tensor
    """Number of the answer from 0; -1 in the prompt, -2 on padding."""

    def inputs(self) -> dict[str, Tensor]:
        """The model's arguments; the mask is bool of shape [rows, 1, tokens, tokens]."""
        tokens = self.branch.shape[1]
        own = self.branch[:, :, None] == self.branch[:, None, :]
        seen = own | (self.branch[:, None, :] == -1)
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=self.branch.device).tril()
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "labels": self.labels,
            "attention_mask": (seen & causal)[:, None],
        }

    def sums(self, log_probs: Tensor, answers: int) -> Tensor:
        """Sum over each answer's tokens, of shape [rows, answers].

        Args:
            log_probs: Of the labels after the first, zero without one: of shape [rows, tokens - 1].
            answers: Most answers of a row.
        """
        of = self.branch[:, 1:].clamp(min=0)
        sums = log_probs.new_zeros(len(log_probs), answers)
        return sums.scatter_add(1, of, log_probs)


def branch(entries: Sequence[Entry], device: torch.device) -> BranchedBatch:
    """A row for each entry."""
    rows = [_row(prompt, answers) for prompt, answers in entries]
    columns = [
        pad_sequence([torch.tensor(row[n]) for row in rows], batch_first=True, padding_value=fill)
        for n, fill in enumerate((0, 0, -100, -2))
    ]
    return BranchedBatch(*(column.to(device) for column in columns))


def can_branch(model: PreTrainedModel, entry: Entry, sums: Tensor) -> bool:
    """Whether a model scores branches like sequences of their own.

    Some have no attention that a mask could change, or one of their own. So they are asked once.

    Args:
        model: With TRL's fused head, in evaluation mode.
        entry: A prompt and its answers.
        sums: What the model says of each answer after the prompt alone, of shape [answers].
    """
    if model.config.get_text_config()._attn_implementation != "sdpa":
        return False
    try:
        found = score_branches(model, [entry])[0]
    except (RuntimeError, ValueError, TypeError):
        return False
    return bool(torch.allclose(found, sums, rtol=0, atol=_TOLERANCE))


def score_branches(model: PreTrainedModel, entries: Sequence[Entry]) -> Tensor:
    """Log-probability of each answer, in nats, of shape [entries, most answers]."""
    batch = branch(entries, model.device)
    out = model(**batch.inputs(), use_cache=False, fused_lm_head=True)
    return batch.sums(out.log_probs, max(len(answers) for _, answers in entries))


def _row(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> tuple[list[int], ...]:
    """Token ids, positions, labels and branches."""
    shared = len(prompt) - 1
    ids, positions = list(prompt[:-1]), list(range(shared))
    labels, branches = [-100] * shared, [-1] * shared
    for number, answer in enumerate(answers):
        ids += [prompt[-1], *answer]
        positions += range(shared, shared + 1 + len(answer))
        labels += [-100, *answer]
        branches += [number] * (1 + len(answer))
    return ids, positions, labels, branches
