"""Test sets of the user's own: prompts with reference answers, and what is measured of the answers.

Each metric of a test set becomes a task of the evaluation, named `DATASET:METRIC`, with a score in
[0, 1] for every item, positive is better: so the gate pairs it like any benchmark.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from posttrain.recipe.base import Strict

TESTS = "tests:"
"""Begins the inputs of `evaluate` that hold the rows of a test set; then comes the dataset."""


class TestSet(Strict):
    """Prompts of a dataset, answered greedily, and the metrics of the answers."""

    __test__ = False  # pytest takes every class named Test... for tests

    dataset: str
    """Name under `datasets`. Where a stage trains on it, its held-out rows are asked; else all."""
    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    """What is measured of each answer."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Rows asked, drawn with the evaluation's seed. Default: all."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer, in tokens."""
