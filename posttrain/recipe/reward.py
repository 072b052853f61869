"""`reward`: a model that scores answers, learned from pairs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from posttrain.recipe.adapters import BottleneckConfig
from posttrain.recipe.base import ArtifactKind, RowFamily
from posttrain.recipe.preferences import PreferenceConfig


class RewardConfig(PreferenceConfig):
    """Learns to score the chosen answer of a pair above the rejected one (Bradley-Terry).

    Leaves a reward model; the model that the next stage starts from stays the one before it.
    A batch is counted in pairs. Held-out loss is nats a pair, ln 2 = 0.69 for one who guesses.
    """

    produces: ClassVar[ArtifactKind] = "reward"
    accounts: ClassVar[frozenset[str]] = PreferenceConfig.accounts | {"reward.html"}
    family: ClassVar[RowFamily] = "preferences"
    peak_learning_rate: ClassVar[float] = 1e-5
    trl_config: ClassVar[str | None] = "RewardConfig"

    stage: Literal["reward"] = "reward"
    center: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the squared sum of a pair's two scores, which keeps scores around zero (Eisenstein
    et al., 2023, arXiv:2312.09244, appendix B). 0 leaves them where they fall."""
    use_margins: bool = True
    """Ask for at least the `margin` of a pair between its scores, where rows have one (Touvron et
    al., 2023, arXiv:2307.09288, equation 2)."""

    @model_validator(mode="after")
    def _adapter_holds_the_head(self) -> Self:
        adapter = self.adapter
        if adapter is not None and (
            adapter.prompt_learning or isinstance(adapter, BottleneckConfig)
        ):
            raise ValueError(
                f"an adapter of type `{adapter.type}` cannot hold the head that scores: write "
                "`lora`, `adalora`, `ia3` or `vera`, or `adapter: null` to train all weights"
            )
        return self
