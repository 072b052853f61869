"""`kto`: learning from answers that were marked good or bad, one by one."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.recipe.adapters import PositiveFloat
from posttrain.recipe.base import RowFamily
from posttrain.recipe.dpo import Reference
from posttrain.recipe.preferences import ReferencedConfig

Weight = Annotated[float, Field(ge=0)]


class KtoConfig(ReferencedConfig):
    """Kahneman-Tversky optimization (Ethayarajh et al., 2024, arXiv:2402.01306).

    Reads marked answers, and pairs too: each as one wanted and one unwanted answer. Nothing is
    dropped out while training, as in `dpo`.
    """

    family: ClassVar[RowFamily] = "kto"
    also_reads: ClassVar[frozenset[RowFamily]] = frozenset({"preferences"})
    peak_learning_rate: ClassVar[float] = 1e-6
    trl_config: ClassVar[str | None] = "KTOConfig"

    stage: Literal["kto"] = "kto"
    beta: PositiveFloat = 0.1
    """How closely the model stays to its reference; more is closer."""
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`apo_zero_unpaired` (arXiv:2408.06266) for answers better than the model's own."""
    desirable_weight: Weight | None = None
    """Weight of wanted answers. Default: 1, or as many times more as makes both sides count alike
    where there are fewer of them (the paper's equation 8)."""
    undesirable_weight: Weight | None = None
    """Weight of unwanted answers. Default: in the same way."""
    reference: Reference = "computed"
    """The model as it was before this stage: `computed` beside each step, or `cached`."""
