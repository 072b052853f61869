"""`dpo`: learning from pairs directly, without a reward model."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from posttrain.recipe.adapters import PositiveFloat
from posttrain.recipe.base import RowFamily
from posttrain.recipe.preferences import ReferencedConfig

DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]
"""TRL's losses by its names."""

_SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}
"""Losses that take some pairs to be the wrong way round."""

Reference = Literal["computed", "cached"]
"""When the reference's log-probabilities are computed: at each step, or once for good."""


class DpoConfig(ReferencedConfig):
    """Direct preference optimization (Rafailov et al., 2023, arXiv:2305.18290).

    Nothing is dropped out while training, whatever `adapter.dropout` says, lest dropout count as a
    difference from the reference; `extra_args: {disable_dropout: false}` brings it back.
    """

    family: ClassVar[RowFamily] = "preferences"
    peak_learning_rate: ClassVar[float] = 5e-7
    trl_config: ClassVar[str | None] = "DPOConfig"

    stage: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """How closely the model stays to its reference; more is closer. Usual: 0.1 to 0.5."""
    loss: DpoLoss = "sigmoid"
    """What is done with the difference of the two log-ratios; `sigmoid` is DPO itself. `aot` and
    `aot_unpaired` compare the rows of a pass with each other: there, and only there, the
    micro-batch and the number of processes shape the result."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs assumed to be the wrong way round, for `exo_pair` (needs it; 0.001 is usual),
    `robust`, `aot` and `aot_unpaired`."""
    reference: Reference | Literal["none"] = "computed"
    """The model as it was before this stage: `computed` beside each step, or `cached` as an
    artifact of its own, which pays off from the second epoch and for each further `beta` that is
    tried. `none` compares the answers' own probabilities."""

    @model_validator(mode="after")
    def _smoothing_fits_the_loss(self) -> Self:
        if self.loss == "exo_pair" and self.label_smoothing == 0:
            raise ValueError("`loss: exo_pair` needs `label_smoothing` above 0: write 0.001")
        if self.label_smoothing and self.loss not in _SMOOTHED:
            raise ValueError(
                f"`loss: {self.loss}` takes no `label_smoothing`: remove it, or write "
                "`loss: robust`"
            )
        return self
