"""Writing models and adapters so that the same training leaves the same bytes.

Artifacts are addressed by content, so nothing may be in them that differs between two runs of the
same thing: no paths, no dates, no unordered sets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import ModelError
from posttrain.store.files import write_json

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TRANSIENT = {
    "config.json": ("_name_or_path", "_model_name_or_path"),
    "generation_config.json": (),
    "tokenizer_config.json": ("name_or_path", "is_local", "local_files_only"),
    "adapter_config.json": (),
}
"""Keys that say where or how a model was loaded, which is no property of the model."""

_UNORDERED = ("target_modules", "modules_to_save")
"""Keys of an adapter's config that peft keeps as sets."""


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Complete weights as safetensors, with tokenizer, chat template and generation config."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _make_reproducible(folder)


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, base_digest: str
) -> None:
    """The adapter alone. Its config names the base by content digest, not by path."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_digest
    # `False` keeps peft from asking the Hub whether the base's vocabulary has grown.
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    _make_reproducible(folder)


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the parameters in place. Buffers stay: a rotary table in 16 bits is another model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def stored_dtype(folder: Path | str) -> torch.dtype:
    """The precision that a model folder's config states; float32 if it states none."""
    import torch
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).dtype or torch.float32


def final_logits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], positions: int = 16
) -> list[torch.Tensor]:
    """Logits at the last positions of each prompt, in float32, to compare two forms of a model.

    Args:
        model: A causal language model, in evaluation mode.
        prompts: Token ids of each prompt.
        positions: Positions kept of each; they depend on all that precedes, and all of them
            would be gigabytes with a large vocabulary.

    Returns:
        A tensor of shape [min(positions, length), vocabulary] for each prompt.
    """
    import torch

    logits = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=model.device)
            out = model(input_ids=ids, logits_to_keep=positions)
            logits.append(out.logits[0].float().cpu())
    return logits


def max_difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference of two lists of logits; infinite where one is not a number."""
    import torch

    largest = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
    return largest if torch.isfinite(torch.tensor(largest)) else float("inf")


def check_reload(
    folder: Path, expected: Sequence[torch.Tensor], prompts: Sequence[Sequence[int]], bound: float
) -> None:
    """Load a saved model from disk and compare its logits with those it had in memory.

    Raises:
        ModelError: they differ by more than `bound`, or the folder cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"the saved model cannot be loaded again: {error}") from error
    if torch.cuda.is_available():
        model = model.cuda()
    difference = max_difference(expected, final_logits(model.eval(), prompts))
    if difference > bound:
        raise ModelError(
            f"the saved model is not the one in memory: logits differ by {difference:.2g} "
            f"(bound {bound:g})"
        )


def _make_reproducible(folder: Path) -> None:
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card template, all blanks
    for name, transient in _TRANSIENT.items():
        path = folder / name
        if not path.exists():
            continue
        config = json.loads(path.read_bytes())
        for key in transient:
            config.pop(key, None)
        for key in _UNORDERED:
            if isinstance(config.get(key), list):
                config[key] = sorted(config[key])
        write_json(path, config)
