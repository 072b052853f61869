"""What an evaluation and a verdict say, as files: `results.json` and `verdict.json`.

Imports nothing heavy: the command line reads these as well.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain.errors import DataError
from posttrain.store.files import write_json

Outcome = Literal["pass", "fail", "not enough evidence"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Record = TypeVar("Record", bound=_Record)


class TaskResult(_Record):
    """One benchmark, as it was asked for: a task, or a group over its subtasks."""

    task: str
    metric: str
    """The metric that counts: `acc_norm` where there is one, else `acc`, else the first."""
    value: float
    """Mean over the items."""
    standard_error: float | None
    """Of `value`, over items; None for a single item."""
    n: int
    """Items answered."""
    higher_is_better: bool
    metrics: dict[str, float]
    """Means of all metrics that have a number for each item."""
    groups: dict[str, float]
    """Value of each subtask, for a group such as MMLU; empty otherwise."""


class PerplexityResult(_Record):
    """How well the model predicts held-out rows."""

    perplexity: float
    """exp(nats / tokens), so long rows weigh more."""
    nats_per_token: float
    bits_per_byte: float
    """Independent of the tokenizer, unlike perplexity."""
    rows: int
    tokens: int
    """Scored tokens: answers only for chats, everything for documents."""
    bytes: int
    """UTF-8 bytes that these tokens spell."""


class TaskSettings(_Record):
    """What was asked of one leaf task."""

    name: str
    version: str
    num_fewshot: int


class Settings(_Record):
    """All that has to be equal for two evaluations to be comparable."""

    lm_eval: str
    """Version of lm-eval."""
    tasks: tuple[TaskSettings, ...]
    limit: int | None
    seed: int
    dtype: str
    """Resolved precision of the weights."""
    questions_in_chat_template: bool
    chat_template: str | None
    """SHA-256 of the tokenizer's chat template."""
    perplexity_rows: int
    """Most held-out rows that were scored."""
    perplexity_max_length: int
    """Longest scored row, in tokens."""

    @property
    def digest(self) -> str:
        """SHA-256 over the settings."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: Settings) -> list[str]:
        """Names of the settings that differ, with both values."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [
            f"{key}: {mine[key]!r} and {theirs[key]!r}" for key in mine if mine[key] != theirs[key]
        ]


class EvaluationResults(_Record):
    """Content of `results.json`."""

    tasks: tuple[TaskResult, ...]
    perplexity: PerplexityResult | None
    settings: Settings
    settings_digest: str
    """Two evaluations are compared only where this is equal."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read an evaluation's folder.

        Raises:
            DataError: the folder holds no evaluation that this version can read.
        """
        return _load(cls, folder / "results.json")

    def save(self, folder: Path) -> None:
        """Write `results.json`."""
        write_json(folder / "results.json", self.model_dump(mode="json"))


class Check(_Record):
    """One benchmark, candidate against base. A positive difference is better."""

    task: str
    metric: str
    base: float
    candidate: float
    difference: float
    low: float
    """One-sided lower bound of the difference, at the verdict's confidence."""
    high: float
    """One-sided upper bound."""
    n: int
    p_worse: float
    """One-sided p-value against "the drop is at most `max_drop`"."""
    mcnemar_p: float | None
    """Two-sided exact p-value of "equally often right"; None where scores are not right/wrong."""
    smallest_detectable_drop: float
    """Drop that this many items show with a chance of 80%."""
    items_needed: int | None
    """Items that would probably settle an open check; None when settled, or out of reach."""
    verdict: Outcome
    sentence: str
    """The check in words."""


class PerplexityCheck(_Record):
    """Held-out perplexity, candidate against base, paired by row."""

    requirement: Literal["must_improve", "must_not_rise"]
    base: float
    """Perplexity of the base."""
    candidate: float
    difference: float
    """Nats a token by which the candidate is better."""
    low: float | None
    """One-sided lower bound; None with too few rows for one."""
    high: float | None
    rows: int
    p_worse: float
    verdict: Outcome
    sentence: str


class Verdict(_Record):
    """Content of `verdict.json`."""

    verdict: Outcome
    reasons: tuple[str, ...]
    """What decided: the failed checks, else the open ones, else all of them."""
    checks: tuple[Check, ...]
    perplexity: PerplexityCheck | None
    max_drop: float
    confidence: float

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a verdict's folder.

        Raises:
            DataError: the folder holds no verdict that this version can read.
        """
        return _load(cls, folder / "verdict.json")

    def save(self, folder: Path) -> None:
        """Write `verdict.json`."""
        write_json(folder / "verdict.json", self.model_dump(mode="json"))


def three_digits(value: float) -> str:
    """A positive number for reading: `9.81`, `12.3`, `1,234`."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}"


def _load(kind: type[Record], path: Path) -> Record:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path.parent}: no {path.name} in it") from None
    except ValidationError as error:
        raise DataError(f"{path}: cannot be read by this version: {error}") from error
