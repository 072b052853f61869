"""Whether a way to train fits into memory: to first order, from the number of parameters alone.

It is meant for choosing a method before there is a model to look at. All figures are GiB (2**30
bytes), the unit in which the memory of GPUs is sold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posttrain.recipe.adapters import LoraConfig
from posttrain.recipe.training import Batching

Weights = Literal["qlora", "lora", "full"]
"""What is trained and how the base is held, from the most frugal to the least."""

FRUGAL_FIRST: tuple[Weights, ...] = ("qlora", "lora", "full")

_GIB = 2**30
_FULL_BYTES = 16
"""Mixed precision with AdamW: weights 2, gradients 2, and in float32 weights 4, momentum 4 and
variance 4 bytes a parameter (Rajbhandari et al., 2020, arXiv:1910.02054, section 3.1). In float32
alone it is 16 as well: 4, 4 and 8."""
_ADAPTER_BYTES = 16
"""Of an adapter in float32: weights 4, gradients 4, AdamW's moments 8."""
_NF4_BYTES = 0.55
"""Four bits, the quantized constants (0.127 bits: Dettmers et al., 2023, arXiv:2305.14314), and
embeddings and norms that stay in 16 bits."""
_ASPECT = 128
"""Width to depth of usual decoders: 4096 to 32 in models of 7 billion parameters."""
_VOCABULARY = 50_000
_RUNTIME_GB = 1.0
"""What a device keeps for libraries and contexts."""
_COMFORT = 0.8
"""Share of the memory that a method may need to be advised where a more frugal one exists. The rest
is for longer rows, larger vocabularies and fragmentation. Our choice."""
_BRIM = 0.95
"""The same for the most frugal method, at one row a pass."""
_ROWS_A_PASS = 8


@dataclass(frozen=True)
class Device:
    """What training runs on."""

    kind: Literal["cpu", "gpu"]
    gb: float
    """Memory of one device in GiB."""
    count: int
    """Devices that train together."""


@dataclass(frozen=True)
class Need:
    """GiB that one device needs."""

    weights_gb: float
    """Weights held, in the precision that they are held in."""
    states_gb: float
    """Gradients and optimizer state, and the float32 copy of what is trained."""
    activations_gb: float
    """Activations of one pass with checkpointing, and its logits."""

    @property
    def total_gb(self) -> float:
        """Everything, with what the libraries take."""
        return self.weights_gb + self.states_gb + self.activations_gb + _RUNTIME_GB


def need(
    method: Weights,
    parameters: float,
    device: Device,
    *,
    rows: int = _ROWS_A_PASS,
    sharded: bool = False,
) -> Need:
    """Memory that one device needs.

    Args:
        method: what is trained.
        parameters: size of the model in billions.
        device: what it is trained on; on a CPU weights and activations are float32.
        rows: rows a forward pass, each of the default `max_length`.
        sharded: whether ZeRO-3 divides weights and states over the devices.
    """
    count = parameters * 1e9
    held = 2 if device.kind == "gpu" else 4
    parts = device.count if sharded else 1
    if method == "full":
        weights, states = count * held, count * (_FULL_BYTES - held)
    else:
        weights = count * (held if method == "lora" else _NF4_BYTES)
        states = _adapter_parameters(count) * _ADAPTER_BYTES
    activations = _activation_bytes(count, rows, bytes_each=held)
    return Need(weights / parts / _GIB, states / parts / _GIB, activations / _GIB)


def fits(method: Weights, parameters: float, device: Device) -> bool:
    """Whether a method is one to advise on this device, for its memory."""
    if method == "qlora":
        return need(method, parameters, device, rows=1).total_gb <= _BRIM * device.gb
    smallest = need(method, parameters, device, sharded=device.count > 1)
    return smallest.total_gb <= _COMFORT * device.gb


def fits_undivided(method: Weights, parameters: float, device: Device) -> bool:
    """Whether every device can hold all of it, so that nothing need be sharded."""
    return need(method, parameters, device).total_gb <= _COMFORT * device.gb


def largest_model(device: Device) -> float:
    """Billions of parameters of the largest model that QLoRA fits, to within 2%."""
    low, high = 0.0, 10_000.0
    while high - low > 0.02 * high and high > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if fits("qlora", middle, device) else (low, middle)
    return low


def _width_and_depth(count: float) -> tuple[float, float]:
    """From parameters = 12 * depth * width**2 (Kaplan et al., 2020, arXiv:2001.08361)."""
    width = (count * _ASPECT / 12) ** (1 / 3)
    return width, width / _ASPECT


def _adapter_parameters(count: float) -> float:
    """Of LoRA at the default rank on all linear layers: 18 widths in and out a block."""
    width, depth = _width_and_depth(count)
    return LoraConfig().rank * 18 * width * depth


def _activation_bytes(count: float, rows: int, bytes_each: int) -> float:
    """With checkpointing: every block's input, one block's activations, and the logits.

    A block of 16-bit activations takes 34 bytes a token and unit of width without the attention
    scores, which fused kernels do not store (Korthikanti et al., 2022, arXiv:2205.05198).
    """
    width, depth = _width_and_depth(count)
    tokens = rows * Batching().max_length
    inputs = bytes_each * tokens * width * depth
    one_block = 34 * (bytes_each / 2) * tokens * width
    logits = (bytes_each + 4) * tokens * _VOCABULARY
    return inputs + one_block + logits
