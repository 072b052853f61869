"""`reference`: log-probabilities of a dataset's answers under a model that stays as it is."""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.recipe.adapters import PositiveInt, Quantization
from posttrain.recipe.base import ArtifactKind, DType, StageConfig, unhashed


class ReferenceConfig(StageConfig):
    """What `reference: cached` of a `dpo` or `kto` stage stands for; no stage of a recipe."""

    produces: ClassVar[ArtifactKind] = "report"

    stage: Literal["reference"] = "reference"
    method: Literal["dpo", "kto"]
    """Whose rows: pairs, or single answers, and others' answers for KTO's KL term."""
    max_length: PositiveInt
    """Longest sequence, in tokens."""
    max_held_out_rows: PositiveInt
    """Held-out rows that are scored as well."""
    quantization: Quantization | None = None
    """Of the training stage: its reference is the base in 4 bits, too."""
    dtype: DType = "auto"
    """Precision of the weights."""
    micro_batch_size: PositiveInt = unhashed(8, "Rows a forward pass.")
