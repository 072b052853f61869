"""`convert`: a GGUF file becomes a safetensors folder, once. Implied by a GGUF model reference."""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.recipe.base import ArtifactKind, StageConfig


class ConvertConfig(StageConfig):
    """Dequantizes a GGUF file to float32 safetensors with its tokenizer and chat template."""

    produces: ClassVar[ArtifactKind] = "model"

    stage: Literal["convert"] = "convert"
