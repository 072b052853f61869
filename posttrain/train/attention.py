"""Attention for rows that lie end to end: each row sees itself alone, and no work is wasted.

Transformers gives such a batch a block-diagonal mask of length x length, so that most of what is
computed is thrown away. Here every row is a call of its own. On CUDA, FlashAttention's kernels for
sequences of different lengths do the same in one call and are preferred where installed.

Importing this module imports torch: do it inside functions.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_ROW = "sdpa_by_row"
"""Name under which the attention of this module is known to transformers."""


def separate_rows(model: PreTrainedModel) -> None:
    """Choose how a model attends in batches whose rows lie end to end.

    Any choice keeps rows apart. Models whose layers look at a window, or that transformers cannot
    switch, keep their own attention and its mask.
    """
    if torch.cuda.is_available() and find_spec("flash_attn") is not None:
        model.set_attn_implementation("flash_attention_2")
    elif model.config._attn_implementation == "sdpa" and not _has_windows(model):
        AttentionInterface.register(BY_ROW, _attend_by_row)
        AttentionMaskInterface.register(BY_ROW, _mask)
        model.set_attn_implementation(BY_ROW)


def _has_windows(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(window) or not kinds <= {"full_attention"}


def _attend_by_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a flat batch; the usual one for any other batch.

    Args:
        module: The attention layer.
        query: Of shape [1, heads, tokens, width], as key and value.
        key: With as many heads as the model has for keys.
        value: As the key.
        attention_mask: None for a flat batch.
        cu_seq_lens_q: Where rows begin, and the end: int32 of shape [rows + 1].
        kwargs: What transformers hands to any attention.

    Returns:
        The output of shape [1, tokens, heads, width], and no weights.
    """
    if cu_seq_lens_q is None:
        whole, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole, None
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    parts = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in rows]
    return torch.cat(parts, dim=1), None


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """No mask where there is no padding: rows of a flat batch are told apart by their bounds."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
