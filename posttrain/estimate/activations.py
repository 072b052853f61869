"""What a forward pass keeps for the backward pass, by formula.

The count is that of Korthikanti et al., 2022 (arXiv:2205.05198, section 4.1) with what has changed
since: attention by PyTorch's fused kernels keeps its inputs, its output and one number a head
instead of a matrix of length x length; feed-forward blocks have gates; norms are RMSNorms computed
in float32 (transformers' LlamaRMSNorm and its copies). Every term is a tensor that autograd saves;
`tests/unit/test_estimate.py` counts them.

All functions give bytes a token and layer unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.estimate.architecture import Architecture, Linear
from posttrain.estimate.trainable import bottlenecks_a_layer, targets
from posttrain.recipe.adapters import (
    AdaLoraConfig,
    AdapterConfig,
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    VeraConfig,
)

FLOAT32 = 4
HEAD_COLUMNS = 32768
"""Columns of the vocabulary that TRL's loss computes at once (trl 1.16, `add_fused_lm_head`)."""
HEAD_ROWS = 4096
"""Positions that it computes at once (trl 1.16, `ChunkedLogProbFunction`)."""
HEAD_LOGITS = 2**26
"""Logits that the head computes at a time on a CPU: a quarter of a GiB in float32."""
HEAD_KEPT = 2**28
"""Logarithms of probabilities that it keeps for the backward pass, at most: a GiB. Those of longer
passes are computed again."""


@dataclass(frozen=True)
class Pass:
    """The rows that go through the model at once, on one device."""

    tokens: int
    """Positions computed, padding included."""
    longest: int
    """Longest row, and the width of a padded pass."""
    flat: bool
    """Rows lie end to end; else they are padded."""
    padded: bool = False
    """Whether attention needs a mask, because rows of a pass differ in length."""


@dataclass(frozen=True)
class Computation:
    """How the pass is computed."""

    width: int
    """Bytes of an activation: 2 under autocast, else 4."""
    cuda: bool
    checkpointing: bool
    varlen_kernel: bool
    """FlashAttention's kernel for rows that lie end to end; without it each row is a call."""


def kept_for_backward(
    sizes: Architecture, adapter: AdapterConfig | None, batch: Pass, how: Computation
) -> float:
    """Bytes that the layers keep for one pass.

    With gradient checkpointing (Chen et al., 2016, arXiv:1604.06174) each layer keeps its input
    alone.
    """
    stream = FLOAT32 * sizes.hidden
    if how.checkpointing:
        # The embeddings' output and the last norm's input and output stay as they are.
        return batch.tokens * (sizes.layers + 3) * stream
    return sizes.layers * one_layer(sizes, adapter, batch, how) + batch.tokens * 3 * stream


def one_layer(
    sizes: Architecture, adapter: AdapterConfig | None, batch: Pass, how: Computation
) -> float:
    """Bytes that one layer keeps for one pass when it recomputes nothing."""
    a_token = _norms(sizes, trained=adapter is None)
    a_token += _attention(sizes, batch, how)
    a_token += _feed_forward(sizes, how)
    a_token += _inputs(sizes, how, flat=batch.flat) if adapter is None else 0
    a_token += _adapter(sizes, adapter, batch, how) if adapter is not None else 0
    weights = _dora_weights(sizes, adapter)
    return batch.tokens * a_token + weights


def during_backward(sizes: Architecture, batch: Pass, how: Computation) -> float:
    """Bytes of a layer's gradients on their way.

    Three tensors have the inner width in a gated block, and two the width of the residual stream.
    """
    a_token = how.width * 3 * sizes.intermediate + FLOAT32 * 2 * sizes.hidden
    return batch.tokens * a_token


def head(sizes: Architecture, batch: Pass, how: Computation) -> float:
    """Bytes for output head and loss.

    On CUDA TRL computes it in tiles of 4096 positions x 32768 words; a tile becomes its own
    gradient in place, and the backward pass computes it again. On a CPU `posttrain.train.head`
    computes up to `HEAD_LOGITS` at a time, and keeps their logarithms where they are few enough.
    """
    hidden = 2 * batch.tokens * FLOAT32 * sizes.hidden
    if how.cuda:
        return min(batch.tokens, HEAD_ROWS) * HEAD_COLUMNS * how.width + hidden
    every = batch.tokens * sizes.vocab
    kept = every if every <= HEAD_KEPT else min(every, HEAD_LOGITS)
    in_16_bits = 2 * how.width if how.width < FLOAT32 else 0
    return kept * FLOAT32 + min(every, HEAD_LOGITS) * (2 * FLOAT32 + in_16_bits) + hidden


def _norms(sizes: Architecture, trained: bool) -> float:
    """Two norms: each keeps its input, a number a token, and if trained the normalized input."""
    return 2 * FLOAT32 * (sizes.hidden * (2 if trained else 1) + 1)


def _attention(sizes: Architecture, batch: Pass, how: Computation) -> float:
    """Query, key, value and output, the logarithm of the softmax's sum for each head, and a mask.

    Under a mask keys and values are repeated for every query head, and the mask becomes a matrix of
    numbers in every layer.
    """
    keys = sizes.query_width if batch.padded else sizes.kv_width
    kept = how.width * (2 * sizes.query_width + 2 * keys) + FLOAT32 * sizes.heads
    return kept + (how.width * batch.longest if batch.padded else 0)


def _feed_forward(sizes: Architecture, how: Computation) -> float:
    """With a gate: its matrix's output, that activated, and the other factor of the product."""
    return how.width * sizes.intermediate * (3 if sizes.gated else 4)


def _inputs(sizes: Architecture, how: Computation, flat: bool) -> float:
    """Inputs of trained matrices, for the gradients of their weights.

    In float32 matrices that read the same share it; autocast makes a copy for each. Attention keeps
    its output anyway, unless rows were calls of their own and their outputs then joined.
    """
    h = sizes.hidden
    reads_stream = [
        linear
        for linear in sizes.linears
        if linear.inputs == h and not _is_attention_output(linear)
    ]
    copies = len(reads_stream) if how.width != FLOAT32 else 2
    joined = sizes.query_width if flat and not how.varlen_kernel else 0
    return how.width * (copies * h + joined + sizes.intermediate)


def _adapter(sizes: Architecture, adapter: AdapterConfig, batch: Pass, how: Computation) -> float:
    """What an adapter on frozen matrices needs beside what flows through them."""
    match adapter:
        case LoraConfig() | AdaLoraConfig() | VeraConfig():
            rank = adapter.initial_rank if isinstance(adapter, AdaLoraConfig) else adapter.rank
            vectors = {LoraConfig: 1, AdaLoraConfig: 2, VeraConfig: 2}[type(adapter)]
            on = targets(sizes, adapter)
            dropout = adapter.input_dropout if isinstance(adapter, LoraConfig) else adapter.dropout
            kept = _adapter_inputs(on, dropout, batch, how)
            kept += sum(how.width * vectors * rank for _ in on)
            if isinstance(adapter, VeraConfig) or (
                isinstance(adapter, LoraConfig) and adapter.dora
            ):
                # The output before and after a trained factor.
                outputs = sum(linear.outputs for linear in on)
                kept += how.width * (2 if isinstance(adapter, LoraConfig) else 1) * outputs
            return kept
        case Ia3Config():
            return FLOAT32 * sum(
                min(linear.inputs, linear.outputs) for linear in targets(sizes, adapter)
            )
        case BottleneckConfig():
            inner = max(1, sizes.hidden // adapter.reduction)
            return bottlenecks_a_layer(adapter) * FLOAT32 * (sizes.hidden + 2 * inner)
        case _:
            return 0.0


def _adapter_inputs(on: Sequence[Linear], dropout: float, batch: Pass, how: Computation) -> float:
    """With dropout each adapter keeps its own mask and its own masked input.

    A mask is of bytes on CUDA and of float32 on a CPU. Without dropout adapters share their input
    in float32, and autocast makes a copy for each.
    """
    if dropout > 0:
        return sum(linear.inputs for linear in on) * (how.width + (1 if how.cuda else FLOAT32))
    if how.width != FLOAT32:
        return how.width * sum(linear.inputs for linear in on)
    joined = batch.flat and not how.varlen_kernel
    shared = {
        _source(linear): linear.inputs
        for linear in on
        if joined or not _is_attention_output(linear)
    }
    return FLOAT32 * sum(shared.values())


def _dora_weights(sizes: Architecture, adapter: AdapterConfig | None) -> float:
    """DoRA's norms of weights and updates: a float32 matrix of the weight's size, a layer."""
    if not isinstance(adapter, LoraConfig) or not adapter.dora:
        return 0.0
    return FLOAT32 * sum(linear.inputs * linear.outputs for linear in targets(sizes, adapter))


def _source(linear: Linear) -> str:
    """Which activation a matrix reads."""
    if linear.name in ("q_proj", "k_proj", "v_proj", "c_attn"):
        return "attention"
    return "feed-forward" if linear.name in ("gate_proj", "up_proj", "c_fc") else linear.name


def _is_attention_output(linear: Linear) -> bool:
    return linear.name in ("o_proj", "attn.c_proj")
