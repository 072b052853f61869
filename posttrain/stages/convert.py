"""`convert`: a GGUF file becomes a folder of float32 safetensors, which every stage can load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import ModelError
from posttrain.recipe.convert import ConvertConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.train.processes import prepare_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROBE = "The quick brown fox jumps over the lazy dog."
_BOUND = 1e-4
"""Largest difference of a logit between memory and disk; the weights are the same float32."""


def main(context: StageContext[ConvertConfig]) -> StageResult:
    """Dequantize, save, and prove that the saved model is the loaded one.

    Input: `weights`, a `.gguf` file.

    Raises:
        ModelError: the file is no GGUF file of a causal language model, or the saved model gives
            other logits than the loaded one.
    """
    from posttrain.train.adapters import count_trainable
    from posttrain.train.outputs import check_reload, final_logits, save_model

    prepare_libraries()
    file = Path(context.input("weights").path)
    context.events.phase(f"dequantizing {file.name}")
    model, tokenizer = _load_gguf(file)
    prompt = tokenizer(_PROBE)["input_ids"]
    logits = final_logits(model, [prompt])
    context.events.phase("saving and checking")
    save_model(model, tokenizer, context.output)
    check_reload(context.output, logits, [prompt], bound=_BOUND)
    parameters = count_trainable(model).total
    template = "with" if tokenizer.chat_template else "without"
    return StageResult(
        headline=f"{parameters / 1e6:.0f}M parameters in float32, {template} a chat template",
        metrics={"parameters": parameters},
    )


def _load_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not file.is_file():
        raise ModelError(f"{file}: there is no such file")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{file}: cannot be read as the GGUF file of a causal language model: {error}"
        ) from error
    _forget_quantization(model)
    _set_padding(model, tokenizer)
    return model.eval(), tokenizer


def _forget_quantization(model: PreTrainedModel) -> None:
    """Drop what still calls the model quantized; transformers would refuse to save it."""
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """GGUF files often name no padding token: use the end-of-sequence one, everywhere alike."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


if __name__ == "__main__":
    run_program(ConvertConfig, main)
