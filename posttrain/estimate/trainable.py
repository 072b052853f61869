"""How many parameters a method trains, by formula."""

from __future__ import annotations

from posttrain.estimate.architecture import Architecture, Linear
from posttrain.recipe.adapters import (
    AdaLoraConfig,
    AdapterConfig,
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
)

_IA3_DEFAULT = ("k_proj", "v_proj", "down_proj", "c_attn", "mlp.c_proj")
_FEEDFORWARD_OUTPUT = ("down_proj", "mlp.c_proj")


def trainable_parameters(sizes: Architecture, adapter: AdapterConfig | None) -> int:
    """Parameters that get a gradient: all of them without an adapter."""
    match adapter:
        case None:
            return sizes.parameters
        case LoraConfig() | AdaLoraConfig() | VeraConfig() | Ia3Config():
            return sizes.layers * sum(
                _beside(linear, adapter) for linear in targets(sizes, adapter)
            )
        case PrefixTuningConfig():
            return _prefix(sizes, adapter)
        case PromptTuningConfig():
            return adapter.virtual_tokens * sizes.hidden
        case BottleneckConfig():
            return sizes.layers * bottlenecks_a_layer(adapter) * _bottleneck(sizes, adapter)
        case _:
            raise TypeError(f"no formula for {type(adapter).__name__}")


def frozen_parameters_added(sizes: Architecture, adapter: AdapterConfig | None) -> int:
    """What an adapter holds and does not train: VeRA's random matrices, shared by all layers."""
    if not isinstance(adapter, VeraConfig):
        return 0
    linears = targets(sizes, adapter)
    widest = max(linear.inputs for linear in linears) + max(linear.outputs for linear in linears)
    return adapter.rank * widest


def targets(sizes: Architecture, adapter: AdapterConfig) -> list[Linear]:
    """The weight matrices of one layer that an adapter is put on."""
    names = getattr(adapter, "target_modules", ())
    if names == "all-linear":
        return list(sizes.linears)
    if names is None:
        names = _IA3_DEFAULT
    return [
        linear for linear in sizes.linears if any(_is_called(linear.name, name) for name in names)
    ]


def bottlenecks_a_layer(adapter: BottleneckConfig) -> int:
    """Two in Houlsby's placement, after attention and after the feed-forward block; else one."""
    return 2 if adapter.placement == "houlsby" else 1


def _beside(linear: Linear, adapter: AdapterConfig) -> int:
    """Trained parameters beside one matrix."""
    match adapter:
        case LoraConfig():
            magnitude = linear.outputs if adapter.dora else 0
            return adapter.rank * (linear.inputs + linear.outputs) + magnitude
        case AdaLoraConfig():  # P, Lambda and Q of the singular value decomposition
            return adapter.initial_rank * (linear.inputs + linear.outputs + 1)
        case VeraConfig():
            return adapter.rank + linear.outputs
        case Ia3Config():
            chosen = adapter.feedforward_modules or _FEEDFORWARD_OUTPUT
            by_input = any(_is_called(linear.name, name) for name in chosen)
            return linear.inputs if by_input else linear.outputs
        case _:
            return 0


def _prefix(sizes: Architecture, adapter: PrefixTuningConfig) -> int:
    """Keys and values of every layer, or the network that computes them."""
    width = sizes.kv_width
    everything = sizes.layers * 2 * width
    if adapter.projection_size is None:
        return adapter.virtual_tokens * everything
    inner = adapter.projection_size
    return adapter.virtual_tokens * width + width * inner + inner + inner * everything + everything


def _bottleneck(sizes: Architecture, adapter: BottleneckConfig) -> int:
    inner = max(1, sizes.hidden // adapter.reduction)
    return 2 * sizes.hidden * inner + inner + sizes.hidden


def _is_called(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")
