"""Writing models and adapters so that the same training leaves the same bytes.

Artifacts are addressed by content, so nothing may be in them that differs between two runs of the
same thing: no paths, no dates, no unordered sets.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import ModelError
from posttrain.store.files import write_json

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TRANSIENT = {
    "config.json": ("_name_or_path", "_model_name_or_path"),
    "generation_config.json": (),
    "tokenizer_config.json": ("name_or_path", "is_local", "local_files_only"),
    "adapter_config.json": (),
}
"""Keys that say where or how a model was loaded, which is no property of the model."""

_UNORDERED = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
"""Keys of an adapter's config that peft keeps as sets."""


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Complete weights as safetensors, with tokenizer, chat template and generation config.

    `weights` are those of a model that is divided over processes; by default its own.
    """
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    _make_reproducible(folder)


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    base_digest: str,
    writes: bool = True,
) -> None:
    """The adapter alone, for the base as it was before training.

    Its config names the base by content digest, not by path. An adapter that started as the
    largest directions of the weights (PiSSA) is written as a LoRA adapter of twice the rank that
    adds what training changed. Of AdaLoRA the ranks that are left are written.

    Args:
        model: As `adapters.add_adapter` made it, in memory.
        tokenizer: Written beside it, chat template included.
        folder: Where to write.
        base_digest: Digest of the base's content.
        writes: Whether this process writes. Under ZeRO-3 every process has to call, since each
            has a part of the weights.
    """
    from peft import get_peft_model_state_dict
    from peft.utils.integrations import gather_params_ctx
    from safetensors.torch import save_file

    # Only what was trained is gathered: peft takes a prompt from its module and not from a state
    # dict, and with a state dict the whole base would have to pass through one process.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with gather_params_ctx(trained, modifier_rank=None), warnings.catch_warnings():
        # Of AdaLoRA a layer may have no rank left, which peft takes for a part of a divided one.
        if model.active_peft_config.peft_type == "ADALORA":
            warnings.filterwarnings("ignore", message="Adapter .* have invalid shape")
        # `False` keeps peft from asking the Hub whether the base's vocabulary has grown.
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    if not writes:
        return
    config = copy.copy(model.active_peft_config)
    initial = vars(model).get("initial_lora")
    if initial is not None:
        weights, config = _without_start(weights, initial, config)
    config.inference_mode = True
    config.base_model_name_or_path = base_digest
    if getattr(config, "tokenizer_name_or_path", None) is not None:
        config.tokenizer_name_or_path = base_digest
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
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
            # Prompt tuning has virtual tokens before the prompt, with logits of their own.
            kept = min(positions, len(prompt))
            out = model(input_ids=ids, logits_to_keep=kept)
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


def _without_start(
    weights: dict[str, torch.Tensor], initial: dict[str, torch.Tensor], config: LoraConfig
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """A LoRA adapter's weights and config less what the adapter started from.

    With W = R + s B0 A0 the base, R what training left of it in the model, and s the scale, the
    model computes R + s B A = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0] (Meng et al., 2024,
    arXiv:2404.02948, appendix C). peft can do that from a second adapter on disk, but not with
    DoRA, whose magnitudes it leaves out.
    """
    import torch

    starts = {
        name.replace(".default.", "."): start.float().cpu() for name, start in initial.items()
    }
    joined = dict(weights)
    for name, start in starts.items():
        now = weights[name].float()
        rows = ".lora_A." in name
        joined[name] = torch.cat([now, start if rows else -start], dim=0 if rows else 1)
    plain = copy.copy(config)
    plain.init_lora_weights = True
    plain.r = 2 * config.r
    # The scale must stay alpha/r, or alpha/sqrt(r) with rsLoRA.
    plain.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    return joined, plain


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
