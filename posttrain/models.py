"""Loading models and tokenizers the same way in every stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import ModelError
from posttrain.hardware import ResolvedDType
from posttrain.stages.program import StageInput

if TYPE_CHECKING:
    from peft import PeftModel
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

    The base is loaded in `dtype` also where the adapter was trained on its 4-bit form: that form
    saves memory in training, and what is served, merged or judged is the base itself.

    Raises:
        ModelError: no loadable weights at the path, or an adapter of another base.
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
        loaded = put_adapter_on(loaded, model.path)
    return loaded.eval()


def has_chat_template(folder: Path) -> bool:
    """Whether a model folder carries a chat template, without loading anything heavy."""
    import json

    if (folder / "chat_template.jinja").exists():
        return True
    config = folder / "tokenizer_config.json"
    return config.exists() and bool(json.loads(config.read_bytes()).get("chat_template"))


def put_adapter_on(base: PreTrainedModel, folder: str) -> PeftModel:
    """The adapter in a folder, on its base; for use, so nothing of it is trainable.

    Raises:
        ModelError: it cannot be read, or is of another base.
    """
    import warnings

    from peft import PeftModel

    from posttrain.train.bottleneck import register

    register()
    try:
        with warnings.catch_warnings():
            # peft goes on with random numbers where the file has no weights for a layer.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # Of AdaLoRA it reads the ranks, and says that it does not.
            warnings.filterwarnings("ignore", message="The following rank_pattern keys")
            adapted = PeftModel.from_pretrained(base, folder)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, UserWarning) as error:
        raise ModelError(
            f"{folder}: cannot be loaded as an adapter of its base: {error}"
        ) from error
    if adapted.active_peft_config.peft_type == "ADALORA":
        # peft reads it when labels are given, and sets it only to train.
        adapted.base_model.trainable_adapter_name = adapted.active_adapter
    return adapted


def virtual_positions(model: PreTrainedModel) -> int:
    """Positions before the first token for which the model returns logits as well.

    Prompt tuning puts learned embeddings before each sequence; everything else adds none.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or config.peft_type != "PROMPT_TUNING":
        return 0
    return int(config.num_virtual_tokens)
