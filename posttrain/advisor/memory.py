"""Whether a way to train fits into memory, before there is a recipe, or even a model, to look at.

`posttrain.estimate` computes the memory. Where only the number of parameters is known, it is asked
about a decoder of the usual shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from posttrain.estimate.activations import Pass
from posttrain.estimate.architecture import Architecture, from_config
from posttrain.estimate.memory import MemoryEstimate, Training, estimate_memory
from posttrain.recipe.adapters import LoraConfig, Quantization
from posttrain.recipe.training import Batching, Sharding

Weights = Literal["qlora", "lora", "full"]
"""What is trained and how the base is held, from the most frugal to the least."""

FRUGAL_FIRST: tuple[Weights, ...] = ("qlora", "lora", "full")

COMFORT = 0.75
"""Share of the memory that a method may need to be advised where a more frugal one exists. The rest
is for longer rows, larger ranks and other programs. Our choice."""
_BRIM = 0.95
"""The same for the most frugal method, at one row a pass."""
_ROWS_A_PASS = 8
_ASPECT = 128
"""Width to depth of usual decoders: 4096 to 32 in models of 7 billion parameters."""
_VOCABULARY = 32_000
_TIED_BELOW = 2e9
"""Models with fewer parameters usually share the embedding with the output head."""


@dataclass(frozen=True)
class Device:
    """What training runs on."""

    kind: Literal["cpu", "gpu"]
    gb: float
    """Memory of one device in GiB."""
    count: int
    """Devices that train together."""


def need(
    method: Weights,
    model: Architecture,
    device: Device,
    *,
    rows: int = _ROWS_A_PASS,
    sharded: bool = False,
) -> float:
    """GiB that one device needs.

    Args:
        method: what is trained; adapters have the default rank.
        model: the model's sizes.
        device: what it is trained on. A GPU computes in bfloat16 with gradient checkpointing, a CPU
            in float32 without.
        rows: rows a forward pass, each of the default `max_length`.
        sharded: whether ZeRO-3 divides weights and states over the devices.
    """
    return _estimate(method, model, device.kind, device.count if sharded else 1, rows).gib


def fits(method: Weights, model: Architecture, device: Device) -> bool:
    """Whether a method is one to advise on this device, for its memory."""
    if method == "qlora":
        return need(method, model, device, rows=1) <= _BRIM * device.gb
    return fits_undivided(method, model, device) or (
        device.count > 1 and need(method, model, device, sharded=True) <= COMFORT * device.gb
    )


def fits_undivided(method: Weights, model: Architecture, device: Device) -> bool:
    """Whether every device can hold all of it, so that nothing need be sharded."""
    return need(method, model, device) <= COMFORT * device.gb


def largest_model(device: Device) -> float:
    """Billions of parameters of the largest usual model that QLoRA fits, to within 5%."""
    low, high = 0.0, 2000.0
    while high - low > 0.05 * high and high > 0.02:
        middle = (low + high) / 2
        low, high = (middle, high) if fits("qlora", typical(middle), device) else (low, middle)
    return low


@cache
def typical(parameters: float) -> Architecture:
    """A decoder of the usual shape with about so many billion parameters.

    Width and depth follow from parameters = 12 * depth * width**2 (Kaplan et al., 2020,
    arXiv:2001.08361); the feed-forward block makes up for what rounding leaves.
    """
    count = parameters * 1e9
    tied = count < _TIED_BELOW
    hidden = max(1, round((count * _ASPECT / 12) ** (1 / 3) / 64)) * 64
    layers = max(2, round(hidden / _ASPECT))
    rest = count - _VOCABULARY * hidden * (1 if tied else 2) - layers * 4 * hidden**2
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": max(hidden, round(rest / (3 * layers * hidden))),
        "num_attention_heads": max(1, hidden // 128),
        "head_dim": min(128, hidden),
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }
    return from_config(config, f"{parameters:g} billion parameters")


@cache
def _estimate(
    method: Weights, model: Architecture, kind: str, processes: int, rows: int
) -> MemoryEstimate:
    length = Batching().max_length
    gpu = kind == "gpu"
    training = Training(
        adapter=None if method == "full" else LoraConfig(),
        quantization=Quantization() if method == "qlora" else None,
        dtype="bfloat16" if gpu else "float32",
        batch=Pass(tokens=rows * length, longest=length, flat=True),
        accumulation=1,
        checkpointing=gpu,
        cuda=gpu,
        world_size=processes,
        sharding=Sharding(zero=3) if processes > 1 else None,
    )
    return estimate_memory(model, training)
