"""Every error posttrain raises on purpose, in one tree.

PosttrainError
├── UsageError            exit 2   the command line or the environment is wrong
├── RecipeError           exit 2   one or more problems in a recipe, all reported at once
├── DataError             exit 1   a source or a row cannot be used
├── SandboxError          exit 1   code of an answer cannot be run safely here
├── ModelError            exit 1   a model folder, Hub id or GGUF file cannot be used
├── StageFailed           exit 1   a stage's program ended with an error
├── StageInterrupted      exit 1   a stage was stopped from outside; the next run goes on
├── NothingPasses         exit 3   no trial of a sweep passes its gate
└── StoreError            exit 1   the store cannot be read or written
    └── CorruptArtifact   exit 1   an artifact's files are not what its manifest says

Messages are for the person who wrote the recipe: what is wrong, where, what to write instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


class PosttrainError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(PosttrainError):
    """The command line or the environment is wrong."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe: where it is, what is wrong, what to write instead."""

    where: str
    """Key in the recipe, such as `stages[2].sft.adapter.rank`."""
    message: str
    fix: str | None = None

    def __str__(self) -> str:
        """Two lines at most: the problem, then the remedy."""
        fix = f"\n    {self.fix}" if self.fix else ""
        return f"  {self.where}: {self.message}{fix}"


class RecipeError(PosttrainError):
    """A recipe has one or more problems; all are reported together."""

    exit_code: ClassVar[int] = 2

    def __init__(self, problems: Sequence[Problem], file: Path | str | None = None) -> None:
        self.problems = tuple(problems)
        self.file = file
        count = len(self.problems)
        noun = "problem" if count == 1 else "problems"
        lines = "\n".join(str(problem) for problem in self.problems)
        super().__init__(f"{file or 'recipe'}: {count} {noun}\n{lines}")


class DataError(PosttrainError):
    """A data source or one of its rows cannot be used."""


class ModelError(PosttrainError):
    """A model cannot be loaded, converted or written."""


class StageFailed(PosttrainError):
    """A stage's program ended with an error; the message is the program's own last one."""

    def __init__(self, stage: str, message: str, log: Path) -> None:
        self.stage = stage
        self.log = log
        super().__init__(f"{stage}: {message}\n  log: {log}")


class StageInterrupted(PosttrainError):
    """A stage was stopped from outside. Its checkpoints are kept and the next run goes on."""


class StoreError(PosttrainError):
    """The store cannot be read or written."""


class CorruptArtifact(StoreError):
    """An artifact's files differ from its manifest."""
