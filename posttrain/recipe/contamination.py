"""`contamination`: the items of evaluation sets, as what no training row may share words with."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.recipe.base import ArtifactKind, StageConfig, unhashed
from posttrain.recipe.prepare import Decontaminate


class ContaminationConfig(StageConfig):
    """Indexes every item of the benchmarks, for `prepare` to look rows up in."""

    produces: ClassVar[ArtifactKind] = "report"

    stage: Literal["contamination"] = "contamination"
    benchmarks: Annotated[tuple[str, ...], Field(min_length=1)]
    """lm-eval tasks whose items are indexed."""
    ngram: Annotated[int, Field(ge=5, le=50)]
    """Words in a row that must not be shared."""
    short_ngram: Annotated[int, Field(ge=3, le=50)]
    """Words that a shorter text needs to be looked for, whole."""
    task_folders: tuple[str, ...] = unhashed((), "Folders with further lm-eval task YAMLs.")
    offline_root: str | None = unhashed(None, "Folder laid out like the Hub.")

    @classmethod
    def of(cls, config: Decontaminate) -> ContaminationConfig:
        """What `prepare` needs, its benchmarks filled in."""
        return cls(
            benchmarks=config.benchmarks or (),
            ngram=config.ngram,
            short_ngram=config.short_ngram,
            task_folders=config.task_folders,
            offline_root=config.offline_root,
        )
