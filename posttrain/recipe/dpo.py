"""`dpo`: learning from pairs directly, without a reward model."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.recipe.adapters import PositiveFloat
from posttrain.recipe.base import RowFamily
from posttrain.recipe.training import TrainingConfig

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

Reference = Literal["computed", "cached"]
"""When the reference's log-probabilities are computed: at each step, or once for good."""


class DpoConfig(TrainingConfig):
    """Direct preference optimization (Rafailov et al., 2023, arXiv:2305.18290)."""

    family: ClassVar[RowFamily] = "preferences"
    peak_learning_rate: ClassVar[float] = 5e-7
    trl_config: ClassVar[str | None] = "DPOConfig"

    stage: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """How closely the model stays to its reference; more is closer. Usual: 0.1 to 0.5."""
    loss: DpoLoss = "sigmoid"
    """What is done with the difference of the two log-ratios; `sigmoid` is DPO itself."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs assumed to be the wrong way round."""
    reference: Reference | Literal["none"] = "computed"
    """The model as it was before this stage: `computed` beside each step, or `cached` as an
    artifact of its own, which pays off from the second epoch and for each further `beta` that is
    tried. `none` compares the answers' own probabilities."""
