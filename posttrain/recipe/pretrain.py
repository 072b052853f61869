"""`pretrain`: continued pretraining on raw text, to bring a domain's knowledge into the weights."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.recipe.adapters import AnyAdapter
from posttrain.recipe.base import RowFamily, Strict
from posttrain.recipe.training import Batching, TrainingConfig


class Replay(Strict):
    """General text among the domain's, against forgetting."""

    dataset: str
    """Name of a dataset of documents."""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Its share of the training documents. 0.05 to 0.1 is usual."""


class PretrainConfig(TrainingConfig):
    """Goes on with next-token prediction on documents; trains all weights by default.

    Gururangan et al., 2020, arXiv:2004.10964: domain- and task-adaptive pretraining.
    """

    family: ClassVar[RowFamily] = "documents"
    # Higher than for SFT: it is still pretraining.
    peak_learning_rate: ClassVar[float] = 5e-5

    stage: Literal["pretrain"] = "pretrain"
    adapter: AnyAdapter | None = None
    """What is trained: all weights by default, or an adapter."""
    batching: Batching = Batching(packing=True)
    """Batch size and block length. `packing` is on: documents share blocks, none sees another."""
    replay: Replay | None = None
    """Mix general text into the domain's."""
