"""Low-rank adapters by peft, and what of a model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.errors import ModelError
from posttrain.recipe.adapters import LoraConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Module
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trainable:
    """How many of a model's parameters are trained."""

    count: int
    total: int

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.count / self.total

    def __str__(self) -> str:
        """Such as `4,884,480 of 139,400,064 parameters (3.5%) are trained`."""
        return f"{self.count:,} of {self.total:,} parameters ({self.share:.1%}) are trained"


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Freeze the model and put float32 low-rank adapters beside its linear layers.

    The B matrices start at zero, so the model is unchanged until the first step
    (Hu et al., 2021, arXiv:2106.09685). The A matrices are drawn from torch's
    global generator: seed it first.

    Raises:
        ModelError: `adapter.target_modules` names no layer of this model.
    """
    import peft

    targets = config.target_modules
    try:
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha or 2 * config.rank,
                lora_dropout=config.dropout,
                target_modules=targets if isinstance(targets, str) else list(targets),
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise ModelError(
            f"adapter.target_modules: {', '.join(targets)}: {error}. "
            f"Linear layers of this model: {', '.join(_linear_layers(model))}"
        ) from error


def count_trainable(model: Module) -> Trainable:
    """Parameters with a gradient, and all."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Trainable(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


def check_trainable(trainable: Trainable, adapter: bool) -> None:
    """Refuse an adapter that trains everything or nothing.

    Raises:
        ModelError: the share of trained parameters is 0%, or 100% with an adapter.
    """
    if trainable.count == 0:
        raise ModelError("no parameter is trained; widen `adapter.target_modules`")
    if adapter and trainable.count == trainable.total:
        raise ModelError(
            "an adapter was asked for and yet all parameters would be trained; "
            "write `adapter: null` to train all weights on purpose"
        )


def _linear_layers(model: Module) -> list[str]:
    from torch.nn import Linear

    names = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, Linear)
    }
    return sorted(names)
