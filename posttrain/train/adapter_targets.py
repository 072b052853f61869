"""Which layers of a model an adapter goes on, where neither the recipe nor peft says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.errors import ModelError

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

_KEYS_AND_VALUES = re.compile(r"w?[kv]|(key|value|[kv])(_proj)?")
"""Usual names of the projections to keys and values; a fused one has another."""


@dataclass(frozen=True)
class Ia3Targets:
    """Names of the layers that IA3 scales."""

    scaled: tuple[str, ...]
    """All of them."""
    feedforward: tuple[str, ...]
    """Those whose input is scaled and not their output."""


def ia3_targets(
    model: PreTrainedModel,
    scaled: tuple[str, ...] | None = None,
    feedforward: tuple[str, ...] | None = None,
) -> Ia3Targets:
    """What the recipe names, and for the rest keys, values and the feed-forward output.

    As in the paper (Liu et al., 2022, arXiv:2205.05638, section 3.3). They are found by name and
    by shape, since peft's table knows few architectures and has queries instead of keys for some;
    the table is asked where keys and values are one layer with the queries.

    Args:
        model: A causal language model without adapter.
        scaled: `target_modules` of the recipe.
        feedforward: `feedforward_modules` of the recipe.

    Raises:
        ModelError: they cannot be told from this model.
    """
    outputs = _feedforward_outputs(model)
    known = _known_to_peft(model)
    if scaled is not None:
        chosen = feedforward if feedforward is not None else {*outputs, *known.feedforward}
        return Ia3Targets(scaled, tuple(name for name in scaled if name in chosen))
    keys_and_values = tuple(name for name in layer_names(model) if _KEYS_AND_VALUES.fullmatch(name))
    if len(keys_and_values) >= 2 and outputs:
        return Ia3Targets((*keys_and_values, *outputs), outputs)
    if known.scaled:
        return known
    raise ModelError(
        f"adapter.target_modules: cannot tell which layers of a {model.config.model_type} model "
        "are keys, values and the feed-forward output; name them in `target_modules`, and the "
        "latter in `feedforward_modules` as well. Its linear layers are "
        f"{', '.join(layer_names(model))}"
    )


def layer_names(model: Module) -> list[str]:
    """Names of the linear layers, without the path before them; sorted."""
    return sorted({name.rpartition(".")[2] for name, _, _ in _linear_layers(model)})


def _feedforward_outputs(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the linear layers from the feed-forward's inner width to the model's."""
    config = model.config.get_text_config()
    width, inner = (getattr(config, key, None) for key in ("hidden_size", "intermediate_size"))
    if width == inner:
        return ()
    found = {
        name.rpartition(".")[2]
        for name, inputs, outputs in _linear_layers(model)
        if (inputs, outputs) == (inner, width)
    }
    return tuple(sorted(found))


def _known_to_peft(model: PreTrainedModel) -> Ia3Targets:
    from peft.utils import constants

    kind = model.config.model_type
    return Ia3Targets(
        tuple(constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind, ())),
        tuple(constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, ())),
    )


def _linear_layers(model: Module) -> list[tuple[str, int, int]]:
    """Name, inputs and outputs of each linear layer, as torch and as GPT-2 have them."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            layers.append((name, layer.in_features, layer.out_features))
        elif isinstance(layer, Conv1D):
            layers.append((name, layer.nx, layer.nf))
    return layers
