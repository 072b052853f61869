"""Bottleneck adapters (Houlsby et al., 2019; Pfeiffer et al., 2021), as an adapter type of peft.

peft has none. What is here makes one of its own kind: a `PeftModel` that peft saves, loads, swaps
and disables like any other, once `register` was called in the process.

Importing this module imports peft and torch: do it inside functions.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import peft
import torch
from peft import mapping
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from posttrain.errors import ModelError
from posttrain.recipe.adapters import BottleneckConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|ffw|feed_?forward|moe", re.IGNORECASE)


class AdapterType(str, enum.Enum):  # noqa: UP042  # peft compares and hashes its own as strings
    """Our addition to `peft.PeftType`, which cannot be extended: a string enum like that one."""

    BOTTLENECK = "BOTTLENECK"


def register() -> None:
    """Make peft know the adapter type; needed before one is loaded, and harmless to repeat.

    `peft.utils.register_peft_method` does the same for members of `PeftType` only.
    """
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[AdapterType.BOTTLENECK] = BottleneckPeftConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[AdapterType.BOTTLENECK] = BottleneckModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[AdapterType.BOTTLENECK] = BottleneckModel.prefix


def add_bottleneck(model: PreTrainedModel, config: BottleneckConfig) -> peft.PeftModel:
    """Freeze the model and put a float32 bottleneck after each block that `placement` names.

    The up-projections start at zero, so the model is unchanged until the first step. The
    down-projections are drawn from torch's global generator: seed it first.

    Raises:
        ModelError: the blocks of this model cannot be told apart.
    """
    register()
    return peft.get_peft_model(
        model,
        BottleneckPeftConfig(
            task_type="CAUSAL_LM",
            placement=config.placement,
            bottleneck_size=max(1, _hidden_size(model) // config.reduction),
            nonlinearity=config.nonlinearity,
            dropout=config.dropout,
        ),
    )


@dataclass
class BottleneckPeftConfig(PeftConfig):  # type: ignore[misc]  # peft is untyped
    """What `adapter_config.json` holds."""

    placement: str = field(default="pfeiffer", metadata={"help": "`pfeiffer` or `houlsby`."})
    bottleneck_size: int = field(default=64, metadata={"help": "Width between the projections."})
    nonlinearity: str = field(default="relu", metadata={"help": "`relu`, `gelu` or `silu`."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    target_modules: str | None = field(
        default=None,
        metadata={"help": "Pattern of the blocks' full names. Default: found in the model."},
    )

    def __post_init__(self) -> None:
        """Name the adapter type."""
        super().__post_init__()
        self.peft_type = AdapterType.BOTTLENECK


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft is untyped
    """A block of a decoder layer with bottlenecks behind it.

    With h the block's output of shape [..., hidden] (before the residual connection, where the
    layer and not the block adds it) the output is h + up(act(down(dropout(h)))). Of several active
    adapters the sum is added. A block that returns a tuple, as attention does, has h as its first
    element.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "bottleneck_activation")

    def __init__(self, base_layer: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.hidden_size = hidden_size
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_activation = nn.ModuleDict()

    def update_layer(self, adapter_name: str, config: BottleneckPeftConfig) -> None:
        """Add a bottleneck of that name, which changes nothing yet."""
        hidden, size = self.hidden_size, config.bottleneck_size
        down = nn.Linear(hidden, size, dtype=torch.float32)
        up = nn.Linear(size, hidden, dtype=torch.float32)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.bottleneck_activation[adapter_name] = ACT2FN[config.nonlinearity]
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output, changed by the active adapters."""
        result = self.base_layer(*args, **kwargs)
        active = [name for name in self.active_adapters if name in self.bottleneck_down]
        if self.disable_adapters or not active:
            return result
        if isinstance(result, tuple):
            return (self._adapt(result[0], active), *result[1:])
        return self._adapt(result, active)

    def _adapt(self, hidden: Tensor, active: list[str]) -> Tensor:
        # Outside of autocast the float32 weights need a float32 input; inside it casts by itself.
        # The sum is rounded to the block's precision once, at the end.
        total = hidden
        for name in active:
            down, up = self.bottleneck_down[name], self.bottleneck_up[name]
            entered = self.bottleneck_dropout[name](hidden.to(down.weight.dtype))
            total = total + up(self.bottleneck_activation[name](down(entered)))
        return total.to(hidden.dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Device only: peft's own takes the precision of the base as well."""
        device = device or next(self.base_layer.parameters()).device
        for name in self.adapter_layer_names:
            layer = getattr(self, name)[adapter_name]
            if torch.device("meta") not in (device, layer.weight.device):
                layer.to(device)

    def __getattr__(self, name: str) -> Any:
        """What the decoder layer asks its block, such as whether its attention is local."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet
                raise
            return getattr(self.base_layer, name)


class BottleneckModel(BaseTuner):  # type: ignore[misc]  # peft is untyped
    """A model whose blocks are wrapped in `BottleneckLayer`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(
        self, peft_config: BottleneckPeftConfig, model_config: dict[str, Any]
    ) -> BottleneckPeftConfig:
        del model_config  # the blocks are found in the model itself
        return peft_config

    def _prepare_model(self, peft_config: BottleneckPeftConfig, model: PreTrainedModel) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = find_blocks(model, peft_config.placement)

    def _create_and_replace(
        self,
        peft_config: BottleneckPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        del current_key, parameter_name  # the signature is peft's
        layer = target
        if not isinstance(layer, BottleneckLayer):
            layer = BottleneckLayer(target, _hidden_size(self.model))
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """As peft's, for blocks: those have no weight of their own to hand over."""
        del child
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> NoReturn:
        raise ModelError(
            "a bottleneck adapter cannot be merged: it has a nonlinearity, which no weights of the "
            "base can stand for; use it beside its base, or train a `lora` adapter"
        )


def find_blocks(model: PreTrainedModel, placement: str) -> str:
    """The pattern of the full names of the blocks that get a bottleneck.

    Blocks are found by structure: the decoder's list of layers, in each the child with weights
    that is called attention, and of the others the one that is called a feed-forward block or
    stands alone; failing that, the projection back to the model's width.

    Args:
        model: A causal language model of transformers.
        placement: `pfeiffer`, feed-forward blocks only, or `houlsby`, attention as well.

    Raises:
        ModelError: the layers, or the blocks in them, cannot be told apart.
    """
    prefix, layers = _decoder_layers(model)
    hidden_size = _hidden_size(model)
    chosen = []
    for index, layer in enumerate(layers):
        where = f"{prefix}.{index}"
        attention, others = _blocks_of(layer)
        names = [_feed_forward(others, hidden_size, where)]
        if placement == "houlsby":
            names = [_only(attention, "attention", where), *names]
        chosen.append(names)
    if all(names == chosen[0] for names in chosen):
        return rf"{re.escape(prefix)}\.\d+\.({'|'.join(map(re.escape, chosen[0]))})"
    full = [f"{prefix}.{index}.{name}" for index, names in enumerate(chosen) for name in names]
    return "|".join(map(re.escape, full))


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the decoder's layers, with its full name."""
    # A model that sees has layers of another kind as well, outside of the decoder.
    decoder = {id(module) for module in model.get_decoder().modules()}
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and id(module) in decoder
        and any(_blocks_of(layer)[0] for layer in module)
    ]
    if not found:
        raise ModelError(
            f"{type(model).__name__}: there is no list of {count} decoder layers with attention in "
            "this model, so no bottleneck adapter can be placed; train a `lora` adapter"
        )
    return found[0]


def _blocks_of(layer: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Children with weight matrices, by name: those called attention, and all others."""
    attention: dict[str, nn.Module] = {}
    others: dict[str, nn.Module] = {}
    for name, child in layer.named_children():
        if any(len(getattr(weight, "ds_shape", weight.shape)) > 1 for weight in child.parameters()):
            called = _ATTENTION.search(name) or _ATTENTION.search(type(child).__name__)
            (attention if called else others)[name] = child
    return attention, others


def _feed_forward(blocks: dict[str, nn.Module], hidden_size: int, where: str) -> str:
    """Name of the feed-forward block among those that are not attention."""
    named = [
        name
        for name, block in blocks.items()
        if _FEED_FORWARD.search(name) or _FEED_FORWARD.search(type(block).__name__)
    ]
    back = [
        name
        for name, block in blocks.items()
        if getattr(block, "out_features", None) == hidden_size
        and getattr(block, "in_features", None) != hidden_size
    ]
    for candidates in (list(blocks), named, back):
        if len(candidates) == 1:
            return candidates[0]
    return _only(blocks, "feed-forward", where)


def _only(blocks: dict[str, nn.Module], kind: str, where: str) -> str:
    if len(blocks) == 1:
        return next(iter(blocks))
    found = ", ".join(f"{name} ({type(block).__name__})" for name, block in blocks.items())
    raise ModelError(
        f"{where}: which of its parts is the {kind} block cannot be told (candidates: "
        f"{found or 'none'}), so no bottleneck adapter can be placed; train a `lora` adapter"
    )


def _hidden_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).hidden_size)
