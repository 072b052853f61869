"""Loading models and tokenizers the same way in every stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import ModelError
from posttrain.hardware import ResolvedDType
from posttrain.stages.program import StageInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(model: StageInput) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    A model without one gets its end-of-sequence token for padding: the attention mask and the
    labels keep padding out of the loss, so the two are never confused.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.path)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"{model.path}: the tokenizer has neither a padding nor an end-of-sequence token; "
                "set `eos_token` in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(model: StageInput, dtype: ResolvedDType) -> PreTrainedModel:
    """A causal language model; for an adapter, its base with the adapter on top (a PeftModel).

    Raises:
        ModelError: no loadable weights at the path.
    """
    import torch
    from transformers import AutoModelForCausalLM

    weights = model.base if model.kind == "adapter" else model.path
    if weights is None:
        raise ModelError(f"{model.path}: an adapter without the model it was trained on")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            weights, dtype=getattr(torch, dtype), use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{weights}: cannot be loaded as a causal language model: {error}"
        ) from error
    if torch.cuda.is_available():
        loaded = loaded.cuda()
    if model.kind == "adapter":
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, model.path)
    return loaded.eval()


def has_chat_template(folder: Path) -> bool:
    """Whether a model folder carries a chat template, without loading anything heavy."""
    import json

    if (folder / "chat_template.jinja").exists():
        return True
    config = folder / "tokenizer_config.json"
    return config.exists() and bool(json.loads(config.read_bytes()).get("chat_template"))
