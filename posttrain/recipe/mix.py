"""`mix`: several prepared datasets become one, each with its share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.recipe.base import ArtifactKind, StageConfig, Strict

MIXED = "mixed:"
"""Begins the names of the inputs of `mix`: the prepared datasets."""

Prefix = Annotated[str, Field(min_length=1)]


class MixSource(Strict):
    """One of the datasets that the mix is made of."""

    dataset: str
    """Name of a dataset, or of an earlier `mix`."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Its share of the training rows relative to the other sources' weights: 3 beside 1 is three
    quarters. Give every source a weight or none."""
    prefix: Prefix | None = None
    """Text put before the first user turn (of documents: before the text) of each of its rows, on
    every side. Names the task in multi-task training; write its last space or line break too."""


class MixShare(Strict):
    """A dataset with a fixed share of the whole mix, taken before the sources divide the rest."""

    dataset: str
    """Name of a dataset, or of an earlier `mix`."""
    fraction: Annotated[float, Field(gt=0, lt=1)]
    """Its share of the training rows of the mix: 0.1 is a tenth."""
    prefix: Prefix | None = None
    """Text put before the first user turn (of documents: before the text) of each of its rows."""


class MixConfig(StageConfig):
    """Mixes prepared datasets: weights or temperature, replay, adversarial rows, task prefixes."""

    produces: ClassVar[ArtifactKind] = "dataset"
    accounts: ClassVar[frozenset[str]] = frozenset({"ledger.parquet", "report.json"})
    code_version: ClassVar[int] = 2

    stage: Literal["mix"] = "mix"
    name: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9][a-z0-9_-]*$",
            description="Name of the mix: what later stages write as `dataset`.",
            json_schema_extra={"affects_result": False},
        ),
    ]
    sources: tuple[MixSource, ...]
    """The datasets to learn from. Without weights and temperature each has as large a share as it
    has rows."""
    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Instead of weights: shares proportional to rows ** (1 / temperature). 1 goes by size, large
    numbers make shares equal; 2 is common for tasks of very different sizes (Raffel et al. 2020,
    arXiv:1910.10683, section 3.5.2)."""
    replay: MixShare | None = None
    """General data against forgetting what the base model could do. 0.05 to 0.1 is usual."""
    adversarial: MixShare | None = None
    """Rows made to mislead the model, with the answers wanted to them."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """Training rows in total. Left out: as many as the shares allow, no source being repeated
    while all others have given every row they have."""
    max_repeats: Annotated[int, Field(ge=1)] = 1
    """How often a training row may occur. More than 1 lets a small source have a large share."""
    seed: int = 0
    """Decides which rows are taken, and their order. Another total takes the same rows first."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of all that is mixed: the sources, then replay, then adversarial rows."""
        shares = (share for share in (self.replay, self.adversarial) if share is not None)
        return (*(source.dataset for source in self.sources), *(share.dataset for share in shares))

    @model_validator(mode="after")
    def _shares_are_clear(self) -> MixConfig:
        if not self.sources:
            # Not a bound on the length: that would also complain of a source that is misspelt.
            raise ValueError("`sources` is empty: name at least one dataset")
        weighted = [source.dataset for source in self.sources if source.weight is not None]
        if weighted and self.temperature is not None:
            raise ValueError(
                f"`{weighted[0]}` has a weight, and `temperature` decides on shares too: remove one"
            )
        bare = [source.dataset for source in self.sources if source.weight is None]
        if weighted and bare:
            raise ValueError(f"`{bare[0]}` has no `weight`: give every source one, or none")
        fixed = [share.fraction for share in (self.replay, self.adversarial) if share is not None]
        if sum(fixed) >= 1:
            raise ValueError(
                f"replay and adversarial rows make up {sum(fixed):.0%} and leave nothing to the "
                "sources: write fractions that sum to less than 1"
            )
        for name in self.datasets:
            if self.datasets.count(name) > 1:
                raise ValueError(
                    f"`{name}` occurs twice: name it once, with the share that it shall have"
                )
            if name == self.name:
                raise ValueError(f"`{name}` would be mixed into itself: give the mix another name")
        return self
