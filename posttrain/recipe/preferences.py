"""What the stages share that learn from answers as they stand: chosen, rejected, marked."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from posttrain.recipe.training import TrainingConfig


class PreferenceConfig(TrainingConfig):
    """Learns from answers that people or programs have compared or marked."""

    @property
    def padding_free(self) -> bool:
        """Never: TRL compares answers side by side, padded on the right."""
        return False

    @model_validator(mode="after")
    def _rows_stay_apart(self) -> Self:
        if self.batching.packing:
            raise ValueError(
                "answers are compared row by row, so rows cannot be packed: write "
                "`batching: {packing: false}`"
            )
        return self


class ReferencedConfig(PreferenceConfig):
    """Learns how its answers' probabilities differ from a reference's, the model before."""

    reference: str

    @model_validator(mode="after")
    def _start_is_the_reference(self) -> Self:
        if self.reference == "computed" and getattr(self.adapter, "init", None) == "pissa":
            raise ValueError(
                "without its adapter the model is not the one it started from, because "
                "`init: pissa` takes directions out of the weights: write `reference: cached`, or "
                "`init: zero`"
            )
        return self

    @model_validator(mode="after")
    def _noise_is_for_likelihood(self) -> Self:
        if self.optimization.neftune_alpha is not None:
            raise ValueError(
                "noise on the embeddings would count as a difference from the reference: remove "
                "`optimization.neftune_alpha`"
            )
        return self
