"""The contract between the one who runs a stage and the stage's program.

`STAGE_DIR` is the stage's work directory:

    stage.json     the job: config, inputs, where to write       read by the program
    output/        what will be published, byte for byte          written by the program
    checkpoints/   what a killed run goes on from                 written by the program
    events.jsonl   progress                                       appended by the program
    result.json    metrics and a headline; its presence = done    written last by the program
    log.txt        everything the program printed                 written by the launcher
    status.json    how the program ended                          written by the launcher
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from posttrain.errors import PosttrainError
from posttrain.events import EventWriter
from posttrain.recipe.base import StageConfig
from posttrain.store.files import write_json

Config = TypeVar("Config", bound=StageConfig)


class StageInput(BaseModel):
    """One input of a stage, as a path on this machine."""

    model_config = ConfigDict(frozen=True)

    kind: str
    """An artifact kind, or `source` for rows or weights that posttrain did not make."""
    path: str
    """Folder of the artifact, a file, or a reference such as `builtin:python-docs/chats`."""
    digest: str
    """Digest of the content."""
    base: str | None = None
    """For an adapter: the folder of the model it was trained on."""
    spec: dict[str, Any] | None = None
    """For rows: the recipe's DatasetSpec."""


class StageJob(BaseModel):
    """What `stage.json` holds."""

    model_config = ConfigDict(frozen=True)

    stage: str
    name: str
    config: dict[str, Any]
    inputs: dict[str, StageInput]
    log_level: str = "INFO"
    cache: str | None = None
    """Folder of what stages remember beside their artifacts, such as a model's answers to single
    questions. What is in it never changes a result; None for none."""


class StageResult(BaseModel):
    """What `result.json` holds."""

    model_config = ConfigDict(frozen=True)

    metrics: dict[str, float] = {}
    """Numbers of this stage, by name, tracked in MLflow."""
    headline: str = ""
    """The one thing a person wants to know, such as `held-out loss 2.34 (was 4.26)`."""
    details: dict[str, Any] = {}
    """Further facts for reports, as plain JSON."""


class StageContext(Generic[Config]):
    """Everything a stage's program needs: its config, its inputs and where to write."""

    def __init__(self, stage_dir: Path, config_type: type[Config]) -> None:
        self.stage_dir = stage_dir
        self.job = StageJob.model_validate_json((stage_dir / "stage.json").read_bytes())
        self.config = config_type.model_validate(self.job.config)
        self.output = stage_dir / "output"
        self.checkpoints = stage_dir / "checkpoints"
        self.rank = int(os.environ.get("RANK", "0"))
        self.events = EventWriter(stage_dir / "events.jsonl", self.rank)

    def input(self, name: str) -> StageInput:
        """The named input; a missing one is a bug of the planner."""
        return self.job.inputs[name]

    def finish(self, result: StageResult) -> None:
        """Declare the output complete. Call once, last, on rank 0."""
        write_json(self.stage_dir / "result.json", result.model_dump())


def run_program(
    config_type: type[Config], main: Callable[[StageContext[Config]], StageResult | None]
) -> None:
    """Run a stage's `main` on the STAGE_DIR of the command line; exit 0 or 1.

    `main` returns the result (rank 0) or None (other ranks). An error is left as the last event,
    with the traceback in the log.
    """
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m posttrain.stages.{config_type.__name__} STAGE_DIR")
    context = StageContext(Path(sys.argv[1]).resolve(), config_type)
    logging.basicConfig(
        level=context.job.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Libraries read these once, on import, so before `main` imports any. Progress goes to
    # events.jsonl; bars and warnings about forks in a log help nobody.
    for name, value in (
        ("TQDM_DISABLE", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    if context.rank == 0:
        _clear_leftovers(context)
    try:
        result = main(context)
        if result is not None:
            context.finish(result)
    except Exception as error:
        if not isinstance(error, PosttrainError):
            traceback.print_exc()
        context.events.error(error)
        sys.exit(1)


def _clear_leftovers(context: StageContext[Any]) -> None:
    """Remove what an earlier, killed attempt half wrote; its checkpoints stay."""
    (context.stage_dir / "result.json").unlink(missing_ok=True)
    if context.output.exists():
        shutil.rmtree(context.output)
    context.output.mkdir(parents=True)


def read_result(stage_dir: Path) -> StageResult | None:
    """The result of a finished program, or None when it did not finish."""
    path = stage_dir / "result.json"
    if not path.exists():
        return None
    return StageResult.model_validate(json.loads(path.read_bytes()))
