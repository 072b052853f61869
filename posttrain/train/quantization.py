"""A frozen base in 4 bits under an adapter: QLoRA (Dettmers et al., 2023, arXiv:2305.14314)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.errors import ModelError
from posttrain.hardware import ResolvedDType
from posttrain.recipe.adapters import Quantization
from posttrain.stages.program import StageInput

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel

HOW_TO_INSTALL = (
    "install `bitsandbytes>=0.50`, which has kernels for CUDA, ROCm and XPU devices and for CPUs, "
    "or remove `quantization`"
)


def load_quantized(
    model: StageInput, quantization: Quantization, compute_dtype: ResolvedDType
) -> PreTrainedModel:
    """A frozen causal language model with its linear layers, less the output head, in 4 bits.

    Embeddings, norms and the output head stay in `compute_dtype`. peft's
    `prepare_model_for_kbit_training` would turn them into float32, half a gigabyte more for each
    billion bits of vocabulary table; TRL no longer does so, since norms and the loss compute in
    float32 whatever their weights have. The gradient that recomputed activations need at the
    embeddings' output is TRL's business, which knows whether they are recomputed.

    Args:
        model: A model folder with unquantized weights.
        quantization: The 4-bit type, and whether its constants are quantized as well.
        compute_dtype: Precision that weights are turned into for each product.

    Raises:
        ModelError: the folder cannot be loaded, or bitsandbytes cannot quantize here.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, compute_dtype)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=dtype,
            use_safetensors=True,
            quantization_config=in_4_bits(quantization, dtype),
        )
    except ImportError as error:
        raise ModelError(f"quantization: {error}; {HOW_TO_INSTALL}") from error
    except (OSError, ValueError, RuntimeError) as error:
        if "bitsandbytes" in str(error):
            raise ModelError(f"quantization: {error}; {HOW_TO_INSTALL}") from error
        raise ModelError(f"{model.path}: cannot be loaded in 4 bits: {error}") from error
    keep_differentiable(loaded)
    return loaded.requires_grad_(False)


def in_4_bits(quantization: Quantization, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The recipe's settings as transformers takes them."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def optimizer_name(quantization: Quantization | None) -> str:
    """Name of the optimizer among transformers' `optim`.

    On CUDA with a quantized base the paper's: AdamW whose state is paged to the machine's memory
    where a long batch needs the GPU's. Elsewhere transformers' default; on a CPU there is nothing
    to page.
    """
    import torch
    from transformers import TrainingArguments

    if quantization is not None and torch.cuda.is_available():
        return "paged_adamw_32bit"
    return str(TrainingArguments.default_optim)


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing the weights anew at the first evaluation on a CPU.

    On CPUs with AVX512-BF16 it does, for a product of which no gradient can be taken: after an
    evaluation the layers below would silently learn nothing.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
