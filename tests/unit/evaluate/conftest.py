"""Builds the work folder of a stage, as its runner would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.recipe.base import StageConfig
from posttrain.stages.program import StageContext, StageInput, StageJob
from posttrain.store.files import write_json

MakeContext = Callable[[StageConfig, Mapping[str, tuple[str, Path]]], StageContext[Any]]


@pytest.fixture
def make_context(tmp_path: Path) -> MakeContext:
    """`make_context(config, {"model": ("model", folder)})` gives a fresh context each time."""

    def make(config: StageConfig, inputs: Mapping[str, tuple[str, Path]]) -> StageContext[Any]:
        folder = tmp_path / f"{config.stage}-{len(list(tmp_path.glob(f'{config.stage}-*')))}"
        (folder / "output").mkdir(parents=True)
        job = StageJob(
            stage=config.stage,
            name=config.stage,
            config=config.model_dump(mode="json"),
            inputs={
                name: StageInput(kind=kind, path=str(path), digest=str(path))
                for name, (kind, path) in inputs.items()
            },
        )
        write_json(folder / "stage.json", job.model_dump())
        return StageContext(folder, type(config))

    return make
