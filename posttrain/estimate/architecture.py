"""The sizes of a model, read from its configuration without loading it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import ModelError
from posttrain.model_reference import ModelReference

StoredDType = Literal["float32", "bfloat16", "float16"]

_GATED_ACTIVATIONS = ("silu", "swish", "swiglu", "gelu_pytorch_tanh", "gelu_tanh")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a decoder layer."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Entries of the matrix, and of the bias."""
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer, in numbers."""

    model_type: str
    layers: int
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width inside the feed-forward block."""
    heads: int
    kv_heads: int
    """Heads of keys and values; fewer than `heads` in grouped-query attention."""
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    """Whether the output head is the embedding."""
    gated: bool
    """Whether the feed-forward block has a gate: three matrices instead of two."""
    dtype: StoredDType
    """Precision of the stored weights."""
    linears: tuple[Linear, ...]
    """Weight matrices of one layer."""
    norm_parameters: int
    """Parameters of the norms of one layer."""
    norm_bias: bool = False
    """Whether norms have a bias beside their weight."""
    position_parameters: int = 0
    """Learned position embeddings."""
    counted: int | None = None
    """Parameters by the weights' own header; None where only the configuration is known."""

    @property
    def query_width(self) -> int:
        """Width of the queries of one token, and of what attention gives back."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys of one token, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """The token embedding."""
        return self.vocab * self.hidden

    @cached_property
    def linear_parameters(self) -> int:
        """All weight matrices of the layers: what 4-bit quantization packs."""
        return self.layers * sum(linear.parameters for linear in self.linears)

    @cached_property
    def parameters(self) -> int:
        """All parameters, a tied head counted once; from the weights' header where it is known."""
        if self.counted is not None:
            return self.counted
        ends = self.embedding_parameters * (1 if self.tied else 2) + self.position_parameters
        final_norm = self.hidden * (2 if self.norm_bias else 1)
        return ends + self.linear_parameters + self.layers * self.norm_parameters + final_norm

    @property
    def matrix_parameters(self) -> int:
        """Entries of every matrix that a token is multiplied with: layers and head, no lookup."""
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        return self.linear_parameters - self.layers * biases + self.vocab * self.hidden


def read_architecture(model: ModelReference | Path) -> Architecture:
    """The sizes of a model folder, a GGUF file, or a Hub model (its config.json alone is fetched).

    Raises:
        ModelError: there is no configuration, or it is not of a dense decoder-only transformer.
    """
    if isinstance(model, Path):
        return _from_folder(model)
    match model.kind:
        case "folder":
            return _from_folder(Path(model.location))
        case "gguf":
            return _from_gguf(Path(model.location))
        case "hub":
            return from_config(_hub_config(model), model.location)


def from_config(config: Mapping[str, Any], where: str) -> Architecture:
    """The sizes that a config.json states, by the names that Llama and its kin or GPT-2 have.

    Args:
        config: What config.json holds.
        where: The model, for messages.

    Raises:
        ModelError: a size is missing, or the model has experts or an encoder.
    """
    text = config.get("text_config", config)
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{where}: an encoder-decoder model; memory is estimated for decoders only"
        )
    if any(text.get(key) for key in _EXPERTS):
        raise ModelError(
            f"{where}: a mixture of experts; memory is estimated for dense models only"
        )
    read = _Reader(text, where)
    heads = read.size("num_attention_heads", "n_head")
    hidden = read.size("hidden_size", "n_embd")
    model_type = str(text.get("model_type", config.get("model_type", "")))
    sizes = Architecture(
        model_type=model_type,
        layers=read.size("num_hidden_layers", "n_layer"),
        hidden=hidden,
        intermediate=read.size("intermediate_size", "n_inner", default=4 * hidden),
        heads=heads,
        kv_heads=read.size("num_key_value_heads", default=heads),
        head_dim=read.size("head_dim", default=hidden // heads),
        vocab=read.size("vocab_size"),
        max_positions=read.size("max_position_embeddings", "n_positions", default=2048),
        tied=bool(config.get("tie_word_embeddings", _tied_by_default(model_type))),
        gated=_is_gated(text, model_type),
        dtype=_stored_dtype(config),
        linears=(),
        norm_parameters=0,
    )
    return _with_layers(sizes, text)


class _Reader:
    """Looks sizes up under the names that different models give them."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self._where = where

    def size(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self._config.get(name)
            if isinstance(value, int) and value > 0:
                return value
        if default is not None:
            return default
        raise ModelError(
            f"{self._where}: the configuration has no `{names[0]}`, so this is no decoder-only "
            "transformer whose memory could be estimated"
        )


def _tied_by_default(model_type: str) -> bool:
    """What a configuration means that says nothing: transformers ties these."""
    return model_type.startswith(("gpt2", "gemma", "gpt_neo"))


def _is_gated(config: Mapping[str, Any], model_type: str) -> bool:
    if model_type in ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "starcoder2", "falcon"):
        return False
    activation = config.get("hidden_act", config.get("hidden_activation", "silu"))
    return activation is None or str(activation) in _GATED_ACTIVATIONS or "gemma" in model_type


def _stored_dtype(config: Mapping[str, Any]) -> StoredDType:
    stated = str(config.get("dtype", config.get("torch_dtype", "float32"))).removeprefix("torch.")
    return stated if stated in ("bfloat16", "float16") else "float32"  # type: ignore[return-value]


def _with_layers(sizes: Architecture, config: Mapping[str, Any]) -> Architecture:
    """Fill in matrices and norms of a layer."""
    if sizes.model_type == "gpt2":
        return _gpt2_layers(sizes)
    kind, h, i = sizes.model_type, sizes.hidden, sizes.intermediate
    qkv_bias = bool(config.get("attention_bias", kind in ("qwen2", "gpt_neox", "phi")))
    out_bias = qkv_bias and kind != "qwen2"
    mlp_bias = bool(config.get("mlp_bias", kind in ("gpt_neox", "phi")))
    feed_forward = [Linear("up_proj", h, i, mlp_bias), Linear("down_proj", i, h, mlp_bias)]
    if sizes.gated:
        feed_forward.insert(0, Linear("gate_proj", h, i, mlp_bias))
    norms = 4 * h if kind.startswith(("gemma2", "gemma3", "gpt_neox")) else 2 * h
    if kind.startswith(("qwen3", "gemma3")):
        norms += 2 * sizes.head_dim
    attention = (
        Linear("q_proj", h, sizes.query_width, qkv_bias),
        Linear("k_proj", h, sizes.kv_width, qkv_bias),
        Linear("v_proj", h, sizes.kv_width, qkv_bias),
        Linear("o_proj", sizes.query_width, h, out_bias),
    )
    linears = (*attention, *feed_forward)
    norm_bias = kind == "gpt_neox"
    return replace(sizes, linears=linears, norm_parameters=norms, norm_bias=norm_bias)


def _gpt2_layers(sizes: Architecture) -> Architecture:
    h, i = sizes.hidden, sizes.intermediate
    linears = (
        Linear("c_attn", h, 3 * h, bias=True),
        Linear("attn.c_proj", h, h, bias=True),
        Linear("c_fc", h, i, bias=True),
        Linear("mlp.c_proj", i, h, bias=True),
    )
    positions = sizes.max_positions * h
    return replace(
        sizes,
        linears=linears,
        norm_parameters=4 * h,
        norm_bias=True,
        position_parameters=positions,
    )


def _from_folder(folder: Path) -> Architecture:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    return replace(from_config(config, str(folder)), counted=_count_parameters(folder))


def _count_parameters(folder: Path) -> int | None:
    """Entries of all tensors, from the headers of the safetensors files; None without any.

    A header is eight bytes of length and as many bytes of JSON
    (https://huggingface.co/docs/safetensors/index#format).
    """
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for file in files:
        try:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length))
        except (OSError, ValueError):
            return None
        shapes = [entry["shape"] for key, entry in header.items() if key != "__metadata__"]
        total += sum(math.prod(shape) for shape in shapes)
    return total if files else None


def _from_gguf(file: Path) -> Architecture:
    """The header of a GGUF file, by the gguf library; its names differ, its numbers do not.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md lists them.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not a GGUF file: {error}") from error
    stated = {key: field for key, field in reader.fields.items() if key[:10] != "tokenizer."}
    values = {key: field.contents() for key, field in stated.items()}
    kind = str(values.get("general.architecture", ""))
    names = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in names:
        raise ModelError(f"{file}: a GGUF file without a token embedding")
    config = {
        "model_type": kind,
        "num_hidden_layers": values.get(f"{kind}.block_count"),
        "hidden_size": values.get(f"{kind}.embedding_length"),
        "intermediate_size": values.get(f"{kind}.feed_forward_length"),
        "num_attention_heads": values.get(f"{kind}.attention.head_count"),
        "num_key_value_heads": values.get(f"{kind}.attention.head_count_kv"),
        "head_dim": values.get(f"{kind}.attention.key_length"),
        "max_position_embeddings": values.get(f"{kind}.context_length"),
        "num_local_experts": values.get(f"{kind}.expert_count"),
        "vocab_size": int(names["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in names,
    }
    counted = sum(int(tensor.n_elements) for tensor in reader.tensors)
    # Converted weights are stored in float32, whatever they were quantized to.
    return replace(from_config(config, str(file)), counted=counted)


def _hub_config(model: ModelReference) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    try:
        path = hf_hub_download(model.location, "config.json", revision=model.revision)
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{model.location}: config.json cannot be fetched: {error}") from error
    config: dict[str, Any] = json.loads(Path(path).read_bytes())
    return config
