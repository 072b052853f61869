"""`reference`: log-probabilities of a dataset's answers under a model that stays as it is."""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.recipe.adapters import PositiveInt
from posttrain.recipe.base import ArtifactKind, DType, StageConfig, unhashed


class ReferenceConfig(StageConfig):
    """What `reference: cached` of a `dpo` or `kto` stage stands for; no stage of a recipe."""

    produces: ClassVar[ArtifactKind] = "report"

    stage: Literal["reference"] = "reference"
    method: Literal["dpo", "kto"]
    """Whose rows: pairs, or single answers with others' prompts for KTO's KL term."""
    max_length: PositiveInt
    """Longest sequence, in tokens."""
    max_held_out_rows: PositiveInt
    """Held-out rows that are scored as well."""
    mismatch: PositiveInt = 1
    """KTO: rows that exchange their answers for its KL term, those of one forward pass."""
    dtype: DType = "auto"
    """Precision of the weights."""
    seed: int = 0
    """Of the training stage's order of rows."""
    micro_batch_size: PositiveInt = unhashed(8, "Rows a forward pass.")
