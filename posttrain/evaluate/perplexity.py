"""Held-out perplexity, row by row, so that two models can be paired."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.evaluate.items import PerplexityRow
from posttrain.evaluate.results import PerplexityResult
from posttrain.events import EventWriter
from posttrain.models import virtual_positions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.train.tokenize import Encoded

TOKENS_PER_BATCH = 2048
"""Padded tokens of one forward pass, at most (a longer row goes alone). With a vocabulary of
50,000 the float32 logits of a batch stay below half a gigabyte."""


@dataclass(frozen=True)
class EncodedRow:
    """A held-out row as tokens; labels are -100 where nothing is scored."""

    id: str
    encoded: Encoded
    dataset: str = ""
    """As in `PerplexityRow`."""
    group: str = ""


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedRow],
    batch_size: int,
    events: EventWriter,
) -> list[PerplexityRow]:
    """Negative log-likelihood of the scored tokens of each row, in the order given.

    Rows of similar length share a forward pass, padded on the right and masked. Rows in which
    nothing is scored are left out.

    Args:
        model: Causal language model, in evaluation mode, on its device.
        tokenizer: Says what padding is and how many bytes the scored tokens spell.
        rows: Tokenized rows.
        batch_size: Rows of one forward pass, at most.
        events: Progress goes here.
    """
    scored = [row for row in rows if row.encoded.trainable]
    nats: dict[int, float] = {}
    for batch in _batches(scored, batch_size):
        losses = _batch_nats(model, tokenizer, [scored[index].encoded for index in batch])
        nats.update(zip(batch, losses, strict=True))
        events.progress(len(nats), len(scored), unit="row")
    return [
        PerplexityRow(
            id=row.id,
            nats=nats[index],
            tokens=row.encoded.trainable,
            bytes=_scored_bytes(tokenizer, row.encoded),
            dataset=row.dataset,
            group=row.group,
        )
        for index, row in enumerate(scored)
    ]


def summarise(rows: Sequence[PerplexityRow]) -> PerplexityResult:
    """Token-weighted perplexity and bits a byte over all rows, of which there is at least one.

    Where the rows are of several groups, of each group as well, in the order of their names.
    """
    groups = sorted({row.group for row in rows})
    if len(groups) == 1:
        return _summary(rows)
    by_group = {group: _summary([row for row in rows if row.group == group]) for group in groups}
    return _summary(rows).model_copy(update={"groups": by_group})


def _summary(rows: Sequence[PerplexityRow]) -> PerplexityResult:
    nats = math.fsum(row.nats for row in rows)
    tokens = sum(row.tokens for row in rows)
    size = sum(row.bytes for row in rows)
    return PerplexityResult(
        perplexity=math.exp(nats / tokens),
        nats_per_token=nats / tokens,
        bits_per_byte=nats / math.log(2) / max(size, 1),
        rows=len(rows),
        tokens=tokens,
        bytes=size,
    )


def _batches(rows: Sequence[EncodedRow], batch_size: int) -> Iterator[list[int]]:
    """Indices of the rows of each forward pass, longest first so that memory runs out at once."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].encoded.input_ids))
    start = 0
    while start < len(order):
        longest = len(rows[order[start]].encoded.input_ids)
        size = max(1, min(batch_size, TOKENS_PER_BATCH // longest))
        yield order[start : start + size]
        start += size


def _batch_nats(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Encoded]
) -> list[float]:
    """Summed negative log-likelihood of each sequence's labels, in nats."""
    import torch

    device = next(model.parameters()).device
    width = max(len(row.input_ids) for row in batch)
    ids = torch.full((len(batch), width), _padding(tokenizer))
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(batch):
        ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        mask[index, : len(row.input_ids)] = 1
        labels[index, : len(row.labels)] = torch.tensor(row.labels)
    targets = labels[:, 1:].to(device)  # position t predicts token t + 1
    # Logits only where some row is scored; for the answers of chats that is half of them.
    positions = (targets != -100).any(dim=0).nonzero().squeeze(1)
    with torch.inference_mode():
        logits = _logits(model, ids.to(device), mask.to(device), positions)
        targets = targets[:, positions]
        # One row at a time: float32 copies of 16-bit logits are the largest thing in memory.
        return [
            _row_nats(row_logits, row_targets)
            for row_logits, row_targets in zip(logits, targets, strict=True)
        ]


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Logits at `positions`, shape (batch, positions, vocabulary)."""
    positions = positions + virtual_positions(model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        kept: Tensor = model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=positions
        ).logits
        return kept
    everything: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return everything[:, positions]


def _row_nats(logits: Tensor, targets: Tensor) -> float:
    import torch.nn.functional as F  # noqa: N812 - torch's own convention

    scored = targets != -100
    losses = F.cross_entropy(logits[scored].float(), targets[scored], reduction="none")
    return float(losses.double().sum())


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    # Masked out, so any token will do for a tokenizer without one for padding.
    return int(tokenizer.pad_token_id or 0)


def _scored_bytes(tokenizer: PreTrainedTokenizerBase, row: Encoded) -> int:
    tokens = [label for label in row.labels[1:] if label != -100]
    return len(str(tokenizer.decode(tokens, skip_special_tokens=True)).encode())
