"""`sft`: supervised fine-tuning on chats, loss on the assistant's turns only."""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.recipe.base import RowFamily
from posttrain.recipe.training import SFT_RATE, TrainingConfig


class SftConfig(TrainingConfig):
    """Trains on the assistant's turns of chats, by an adapter or over all weights."""

    code_version: ClassVar[int] = 2
    family: ClassVar[RowFamily] = "chats"
    peak_learning_rate: ClassVar[float] = SFT_RATE

    stage: Literal["sft"] = "sft"
